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
  auto [at, created] = entries_.try_emplace(call.key, Entry{.phase = call.phase,
                                                            .members = call.members,
                                                            .seats = std::vector<Seat>(call.members.size()),
                                                            .hurried = seat,
                                                            .deadline = deadline,
                                                            .failure = std::nullopt});
  Entry& entry = at->second;
  if (entry.members != call.members) {
    Failure failure{.kind = FailureKind::mismatch, .phase = call.phase};
    failure.detail = fmt::format("call {} of world {} was made with other members by another rank", call.key.sequence, call.key.generation);
    fail(at, failure);
    failure.rank = seat;
    deliver_(rank, call.key, unexpected(failure));
    return std::nullopt;
  }
  if (entry.seats[seat].arrived) return fmt::format("rank {} made call {} of world {} twice", rank, call.key.sequence, call.key.generation);
  entry.seats[seat] = {std::move(part), true};
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
  const auto takes_part = [&](std::size_t seat) { return ranks_[entry.members[seat]].presence == Presence::here; };
  for (std::size_t seat = 0; seat < entry.seats.size(); ++seat) {
    if (takes_part(seat)) gathered.parts.push_back(entry.seats[seat].part);
  }
  const Outcome outcome = std::move(gathered);
  for (std::size_t seat = 0; seat < entry.seats.size(); ++seat) {
    if (!entry.seats[seat].arrived) continue;  // only where survivors meet
    const int member = entry.members[seat];
    if (takes_part(seat)) {
      deliver_(member, node.key(), outcome);
    } else {
      deliver_(member, node.key(), unexpected(gone_itself(member, static_cast<int>(seat), entry.phase)));
    }
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
  for (std::size_t seat = 0; seat < entry.seats.size(); ++seat) {
    if (!entry.seats[seat].arrived) continue;
    entry.seats[seat].part.reset();
    failure.rank = static_cast<int>(seat);
    deliver_(entry.members[seat], at->first, unexpected(failure));
  }
  entry.failure = std::move(failure);
  if (!awaited(entry)) entries_.erase(at);
}

// Whether a member that is still here has yet to learn how the gather ended.
bool Ledger::awaited(const Entry& entry) const {
  for (std::size_t seat = 0; seat < entry.seats.size(); ++seat) {
    if (!entry.seats[seat].arrived && ranks_[entry.members[seat]].presence == Presence::here) return true;
  }
  return false;
}

std::optional<Failure> Ledger::gone_member(const Entry& entry) const {
  std::string detail;
  Failure failure{.kind = FailureKind::peer_lost, .phase = entry.phase};
  for (std::size_t seat = 0; seat < entry.members.size(); ++seat) {
    const Rank& rank = ranks_[entry.members[seat]];
    if (rank.presence == Presence::here) continue;
    if (failure.peer < 0) failure.peer = static_cast<int>(seat);
    detail += fmt::format("{}rank {} {}", detail.empty() ? "" : "; ", seat, rank.reason);
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
    const Entry& entry = current->second;
    if (std::find(entry.members.begin(), entry.members.end(), rank) == entry.members.end()) continue;
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
    for (std::size_t seat = 0; seat < entry.seats.size(); ++seat) {
      if (entry.seats[seat].arrived) continue;
      missing.push_back(static_cast<int>(seat));
      if (entry.phase == Phase::recover) late.push_back(entry.members[seat]);
    }
    if (entry.phase == Phase::recover) continue;
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
  for (const auto& [key, entry] : entries_) {
    if (!entry.failure && (!next || entry.deadline.at() < *next)) next = entry.deadline.at();
  }
  return next;
}

}  // namespace tokenyard::world_internal
