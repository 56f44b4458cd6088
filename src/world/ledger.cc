#include "world/ledger.h"

#include <fmt/format.h>

#include <algorithm>

namespace tokenyard::world_internal {

std::string list_ranks(const std::vector<int>& ranks) {
  constexpr std::size_t kShown = 16;
  const auto shown = std::min(ranks.size(), kShown);
  std::string text = fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", fmt::join(ranks.begin(), ranks.begin() + shown, ", "));
  if (ranks.size() > shown) text += fmt::format(" and {} more", ranks.size() - shown);
  return text;
}

Ledger::Ledger(int size, Deliver deliver, Announce announce) : deliver_(std::move(deliver)), announce_(std::move(announce)), ranks_(size) {}

std::optional<std::string> Ledger::malformed(int rank, const Call& call, const SharedPart& part) const {
  if (part->bytes.size() > kMaxPartBytes) {
    return fmt::format("a part of {} bytes: a gather takes at most {} per rank", part->bytes.size(), kMaxPartBytes);
  }
  std::vector<bool> seen(ranks_.size());
  for (int member : call.members) {
    if (member < 0 || member >= size()) return fmt::format("member {} of a world of {} ranks", member, size());
    if (seen[member]) return fmt::format("rank {} is named twice as a member", member);
    seen[member] = true;
  }
  if (!seen[rank]) return fmt::format("rank {} is no member of its own call", rank);
  return std::nullopt;
}

std::optional<std::string> Ledger::arrive(int rank, const Call& call, SharedPart part, Deadline deadline) {
  if (auto reason = malformed(rank, call, part)) return reason;
  const int seat = static_cast<int>(std::find(call.members.begin(), call.members.end(), rank) - call.members.begin());
  if (ranks_[rank].presence != Presence::here) {
    // The others' gathers fail without it, and are not kept for it.
    deliver_(rank, call.key, unexpected(gone_itself(rank, seat, call.phase)));
    return std::nullopt;
  }
  const auto [at, created] = entries_.try_emplace(
      {call.key, call.members}, Entry{.phase = call.phase, .deadline = deadline, .hurried = seat, .seats = {}, .failure = std::nullopt});
  Entry& entry = at->second;
  if (created) {
    for (const int member : call.members) entry.seats.push_back({.rank = member, .part = nullptr});
  }
  if (entry.seats[seat].arrived) return fmt::format("rank {} made call {} of world {} twice", rank, call.key.sequence, call.key.generation);
  entry.seats[seat] = {rank, std::move(part), true};
  ++entry.arrived;
  if (entry.failure) {
    Failure failure = *entry.failure;
    failure.rank = seat;
    deliver_(rank, call.key, unexpected(std::move(failure)));
    if (!awaited(entry)) entries_.erase(at);
    return std::nullopt;
  }
  if (entry.phase != call.phase) {
    const Seat* const late = &entry.seats[seat];
    const auto other = std::find_if(entry.seats.begin(), entry.seats.end(), [&](const Seat& s) { return s.arrived && &s != late; });
    Failure failure{.kind = FailureKind::mismatch, .phase = call.phase, .peer = seat};
    failure.detail = fmt::format("rank {} called {} where rank {} called {}; all ranks of a world make the same calls in the same order",
                                 seat, name(call.phase), other - entry.seats.begin(), name(entry.phase));
    fail(at, std::move(failure));
    return std::nullopt;
  }
  if (deadline.at() < entry.deadline.at()) {
    entry.deadline = deadline;
    entry.hurried = seat;
  }
  settle(at);
  return std::nullopt;
}

// Ends the gather when it can end.
void Ledger::settle(Entries::iterator at) {
  const Entry& entry = at->second;
  if (entry.phase != Phase::recover) {
    if (auto failure = gone_member(entry)) return fail(at, std::move(*failure));
  }
  if (!awaited(entry)) complete(at);
}

void Ledger::complete(Entries::iterator at) {
  auto node = entries_.extract(at);
  const Entry& entry = node.mapped();
  Gathered gathered{.serial = next_serial_, .parts = {}};
  next_serial_ += entry.seats.size();
  // Only where survivors meet, some may be gone.
  const auto takes_part = [this](const Seat& seat) { return ranks_[seat.rank].presence == Presence::here; };
  for (const Seat& seat : entry.seats) {
    if (takes_part(seat)) gathered.parts.push_back(seat.part);
  }
  const Outcome outcome = std::move(gathered);
  for (int index = 0; const Seat& seat : entry.seats) {
    if (takes_part(seat)) {
      deliver_(seat.rank, node.key().first, outcome);
    } else if (seat.arrived) {
      deliver_(seat.rank, node.key().first, unexpected(gone_itself(seat.rank, index, entry.phase)));
    }
    ++index;
  }
}

// For a rank that calls although it has left, or was given up.
Failure Ledger::gone_itself(int rank, int seat, Phase phase) const {
  Failure failure{.kind = FailureKind::peer_lost, .phase = phase, .rank = seat, .peer = seat};
  failure.detail = fmt::format("rank {} {}", seat, ranks_[rank].reason);
  return failure;
}

void Ledger::fail(Entries::iterator at, Failure failure) {
  Entry& entry = at->second;
  if (entry.failure) return;
  for (int index = 0; Seat & seat : entry.seats) {
    failure.rank = index++;
    if (!seat.arrived) continue;
    seat.part.reset();
    deliver_(seat.rank, at->first.first, unexpected(failure));
  }
  entry.failure = std::move(failure);
  if (!awaited(entry)) entries_.erase(at);
}

// Whether a member that is still here has yet to learn how the gather ended.
bool Ledger::awaited(const Entry& entry) const {
  return std::any_of(entry.seats.begin(), entry.seats.end(),
                     [this](const Seat& seat) { return !seat.arrived && ranks_[seat.rank].presence == Presence::here; });
}

std::optional<Failure> Ledger::gone_member(const Entry& entry) const {
  std::string detail;
  Failure failure{.kind = FailureKind::peer_lost, .phase = entry.phase};
  for (int index = 0; const Seat& seat : entry.seats) {
    const Rank& rank = ranks_[seat.rank];
    if (rank.presence != Presence::here) {
      if (failure.peer < 0) failure.peer = index;
      detail += fmt::format("{}rank {} {}", detail.empty() ? "" : "; ", index, rank.reason);
    }
    ++index;
  }
  if (failure.peer < 0) return std::nullopt;
  failure.detail = std::move(detail);
  return failure;
}

bool Ledger::depart(int rank, Presence presence, std::string reason) {
  if (ranks_[rank].presence != Presence::here) return false;
  ranks_[rank] = {presence, std::move(reason)};
  if (presence == Presence::lost) announce_(rank);
  for (auto at = entries_.begin(); at != entries_.end();) {
    const auto current = at++;  // settling may erase it
    const auto& [name, entry] = *current;
    const std::vector<int>& members = name.second;
    if (std::find(members.begin(), members.end(), rank) == members.end()) continue;
    if (!entry.failure) {
      settle(current);
    } else if (!awaited(entry)) {
      entries_.erase(current);
    }
  }
  return true;
}

bool Ledger::lose(int rank, std::string reason) { return depart(rank, Presence::lost, std::move(reason)); }
bool Ledger::close(int rank) { return depart(rank, Presence::closed, "has closed its world"); }

void Ledger::expire(Deadline::Clock::time_point now) {
  std::vector<int> late;  // for a meeting of survivors
  for (auto at = entries_.begin(); at != entries_.end();) {
    const auto current = at++;
    const Entry& entry = current->second;
    if (entry.failure || entry.deadline.at() > now) continue;
    std::vector<int> missing;
    for (int index = 0; const Seat& seat : entry.seats) {
      if (!seat.arrived) missing.push_back(index);
      ++index;
    }
    if (entry.phase == Phase::recover) {
      for (const int index : missing) late.push_back(entry.seats[index].rank);
      continue;
    }
    Failure failure{.kind = FailureKind::timeout, .phase = entry.phase, .peer = missing.front()};
    failure.expected = static_cast<std::int64_t>(entry.seats.size());
    failure.seen = entry.arrived;
    failure.detail = fmt::format("missing: {}; rank {} waited {} ms; see what they do, or allow more time (TOKENYARD_TIMEOUT_MS)",
                                 list_ranks(missing), entry.hurried, entry.deadline.timeout_ms());
    fail(current, std::move(failure));
  }
  for (const int rank : late) lose(rank, "did not come when the survivors met");  // settles the meeting
}

std::optional<Deadline::Clock::time_point> Ledger::next_deadline() const {
  std::optional<Deadline::Clock::time_point> next;
  for (const auto& [_, entry] : entries_) {
    if (!entry.failure && (!next || entry.deadline.at() < *next)) next = entry.deadline.at();
  }
  return next;
}

}  // namespace tokenyard::world_internal
