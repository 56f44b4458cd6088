// The flags and credits of the direct exchange as a model whose interleavings are all explored: no buffer is overwritten before it was
// read, nothing is read before it was written, nobody waits for ever. The rules are those of src/exchange/direct_*.cc; every store that
// a peer can see is a step of its own. Seeded bugs show that the explorer would notice.

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "protocol/mailbox.h"

namespace tokenyard {
namespace {

using Byte = std::uint8_t;
constexpr int kMaxRanks = 3;
constexpr int kMaxBuffers = 2;

// latency: a dispatch without counts. pull: a combine whose partial sums are read from the sender's expert rows.
enum class Op : Byte { dispatch, latency, combine, pull };

enum class Bug : Byte {
  none,
  no_grant_wait,             // a source guesses the buffer instead of waiting for its grant
  rows_sent_before_written,  // the flag is published before the rows
  granted_while_leased,      // a buffer is granted again when it is leased, not when it comes back
  no_staging_wait,           // partial sums are pushed without the owner's credit
  partials_sent_before_written,
  no_read_wait,        // expert rows are overwritten while peers may read them
  abort_keeps_credit,  // a rejected combine still waits for credits that nobody gives
};

enum class Pc : Byte {
  begin,
  reserve,
  settle,
  read_wait,
  fill,
  counts_write,
  counts_send,
  counts_wait,
  counts_read,
  grants_wait,
  rows_write,
  rows_send,
  rows_wait,
  lease,
  staging_wait,
  partial_write,
  partial_send,
  partial_wait,
  partial_read,
  partial_free,
  leave,
  done,
};

enum Kind : int { kCounts, kRows, kPartials, kKinds };

struct RankState {
  Pc pc;
  Byte op;    // index into the program; its call number is op + 1
  Byte peer;  // of a step that goes through the peers
  Byte epoch, next_grant;
  Byte last_combine, last_pull, unsettled, left, rejected;
  Byte expert_rows;  // the call whose rows lie there
  Byte num_free;
  std::array<Byte, kMaxBuffers> free;    // in the order in which they came back
  std::array<Byte, kMaxBuffers> leased;  // epoch + 1
  Byte granting, granting_peer;          // buffer + 1 that is being granted, and to whom next
};

// What `writer` writes for `owner`.
struct LinkState {
  std::array<Byte, kMaxBuffers> grants;  // epoch e at e % depth: (epoch + 1) * 16 + buffer
  std::array<std::array<Byte, protocol::kRing>, kKinds> sequence;
  std::array<Byte, 2> counts;          // by call parity: the call
  std::array<Byte, kMaxBuffers> rows;  // epoch + 1
  Byte staging;                        // the call
  Byte staging_free, read_done;
};

struct State {
  std::array<RankState, kMaxRanks> rank;
  std::array<std::array<LinkState, kMaxRanks>, kMaxRanks> link;  // [owner][writer]
};
static_assert(std::has_unique_object_representations_v<State>);  // states are compared as bytes

struct Model {
  int ranks = 2;
  int depth = 1;
  std::vector<Op> program;
  Bug bug = Bug::none;
  int rejecting_rank = -1;  // this rank rejects the call at this place of the program
  int rejected_op = -1;
};

struct Verdict {
  std::string violation;  // empty: none
  std::size_t states = 0;
};

class Explorer {
 public:
  explicit Explorer(const Model& model) : model_(model) {}

  Verdict run() {
    visit(initial());
    while (!open_.empty() && verdict_.violation.empty()) {
      const State state = open_.front();
      open_.pop_front();
      if (expand(state) == 0 && !all_done(state)) violate(state, "deadlock");
    }
    verdict_.states = seen_.size();
    return verdict_;
  }

 private:
  State initial() const {
    State state = {};
    for (int r = 0; r < model_.ranks; ++r) {
      RankState& rank = state.rank[r];
      for (int b = 0; b < model_.depth; ++b) {
        rank.free[rank.num_free++] = static_cast<Byte>(b);
        for (int s = 0; s < model_.ranks; ++s) state.link[s][r].grants[b] = static_cast<Byte>((b + 1) * 16 + b);
      }
      rank.next_grant = static_cast<Byte>(model_.depth);
    }
    return state;
  }

  void visit(const State& state) {
    if (!seen_.emplace(reinterpret_cast<const char*>(&state), sizeof state).second) return;
    open_.push_back(state);
  }

  bool all_done(const State& state) const {
    for (int r = 0; r < model_.ranks; ++r) {
      if (state.rank[r].pc != Pc::done) return false;
    }
    return true;
  }

  void violate(const State& state, std::string_view what) {
    if (!verdict_.violation.empty()) return;
    verdict_.violation = what;
    for (int r = 0; r < model_.ranks; ++r) {
      verdict_.violation += "; rank " + std::to_string(r) + ": call " + std::to_string(state.rank[r].op + 1) + ", step " +
                            std::to_string(static_cast<int>(state.rank[r].pc));
    }
  }

  // Tries everything that can happen next; returns how much could.
  int expand(const State& state) {
    int moves = 0;
    for (int r = 0; r < model_.ranks; ++r) {
      for (const auto& next : {advance(state, r), grant(state, r), release(state, r, 0), release(state, r, 1)}) {
        if (!next) continue;
        ++moves;
        visit(*next);
      }
    }
    return moves;
  }

  // The user gives a lease back, at any time and in any order.
  std::optional<State> release(const State& state, int r, int buffer) {
    if (state.rank[r].leased[buffer] == 0 || state.rank[r].granting != 0) return std::nullopt;
    for (int s = 0; s < model_.ranks; ++s) {
      if (state.link[r][s].rows[buffer] != state.rank[r].leased[buffer]) violate(state, "rows overwritten while leased");
    }
    State next = state;
    next.rank[r].leased[buffer] = 0;
    if (model_.bug != Bug::granted_while_leased) start_granting(next.rank[r], buffer);
    return next;
  }

  static void start_granting(RankState& rank, int buffer) {
    rank.free[rank.num_free++] = static_cast<Byte>(buffer);
    rank.granting = static_cast<Byte>(buffer + 1);
    rank.granting_peer = 0;
  }

  std::optional<State> grant(const State& state, int r) const {
    if (state.rank[r].granting == 0) return std::nullopt;
    State next = state;
    RankState& rank = next.rank[r];
    next.link[rank.granting_peer][r].grants[rank.next_grant % model_.depth] =
        static_cast<Byte>((rank.next_grant + 1) * 16 + rank.granting - 1);
    if (++rank.granting_peer == model_.ranks) {
      ++rank.next_grant;
      rank.granting = rank.granting_peer = 0;
    }
    return next;
  }

  // Whether `arrived(peer)` holds for all; if not, whether the call ends because a peer that is missing rejected it.
  template <class Arrived>
  bool await(State& next, int r, Pc then, bool can_abort, Arrived&& arrived) const {
    RankState& rank = next.rank[r];
    bool all = true;
    bool rejected = false;
    for (int p = 0; p < model_.ranks; ++p) {
      if (arrived(p)) continue;
      all = false;
      rejected = rejected || (can_abort && next.rank[p].rejected >= rank.op + 1);
    }
    rank.pc = then;
    if (all) return true;
    rank.unsettled = static_cast<Byte>(rank.op + 1);
    rank.pc = Pc::leave;
    return rejected;
  }

  // One step for the current peer; behind the last peer comes `then`, before it `again`.
  void per_peer(RankState& rank, Pc again, Pc then) const {
    rank.pc = again;
    if (++rank.peer < model_.ranks) return;
    rank.peer = 0;
    rank.pc = then;
  }

  Byte& sequence(State& state, int owner, int writer, Kind kind, int call) const {
    return state.link[owner][writer].sequence[kind][call % protocol::kRing];
  }

  int granted_buffer(const State& state, int r, int peer) const {
    const int epoch = state.rank[r].epoch;
    if (model_.bug == Bug::no_grant_wait) return epoch % model_.depth;
    return state.link[r][peer].grants[epoch % model_.depth] % 16;
  }

  std::optional<State> advance(const State& state, int r) {
    State next = state;
    const bool moved = state.rank[r].pc <= Pc::fill || state.rank[r].pc >= Pc::leave ? step_between(next, r)
                       : state.rank[r].pc < Pc::staging_wait                         ? step_dispatch(next, r)
                                                                                     : step_combine(next, r);
    return moved ? std::optional(next) : std::nullopt;
  }

  // Around the steps of a call.
  bool step_between(State& next, int r) {
    RankState& rank = next.rank[r];
    const int call = rank.op + 1;
    switch (rank.pc) {
      case Pc::begin:
        if (rank.op == model_.program.size()) {
          rank.pc = Pc::done;
          return true;
        }
        rank.pc = model_.program[rank.op] <= Op::latency ? Pc::reserve : Pc::settle;
        if (r == model_.rejecting_rank && rank.op == model_.rejected_op) {
          rank.rejected = rank.unsettled = static_cast<Byte>(call);
          rank.pc = Pc::leave;
        }
        return true;
      case Pc::reserve:
        rank.pc = Pc::settle;
        return rank.num_free > 0 && rank.granting == 0;
      case Pc::settle: {
        constexpr Pc kFirst[] = {Pc::counts_write, Pc::grants_wait, Pc::staging_wait, Pc::read_wait};
        const Pc then = kFirst[static_cast<int>(model_.program[rank.op])];
        if (!await(next, r, then, false, [&](int p) { return next.rank[p].left >= rank.unsettled; })) return false;
        if (rank.unsettled != 0 && model_.bug != Bug::abort_keeps_credit) rank.last_combine = rank.last_pull = 0;
        rank.unsettled = 0;
        return true;
      }
      case Pc::read_wait:
        if (model_.bug == Bug::no_read_wait) rank.last_pull = 0;
        return await(next, r, Pc::fill, false, [&](int p) { return next.link[r][p].read_done >= rank.last_pull; });
      case Pc::fill:
        rank.expert_rows = static_cast<Byte>(call);
        rank.pc = Pc::staging_wait;
        return true;
      case Pc::leave:
        rank.left = static_cast<Byte>(call);
        ++rank.op;
        rank.peer = 0;
        rank.pc = Pc::begin;
        return true;
      default:
        return false;
    }
  }

  bool step_dispatch(State& next, int r) {
    RankState& rank = next.rank[r];
    const auto call = static_cast<Byte>(rank.op + 1);
    LinkState& there = next.link[rank.peer][r];
    const bool flag_first = model_.bug == Bug::rows_sent_before_written;
    switch (rank.pc) {
      case Pc::counts_write:
        there.counts[call % 2] = call;
        rank.pc = Pc::counts_send;
        return true;
      case Pc::counts_send:
        sequence(next, rank.peer, r, kCounts, call) = call;
        per_peer(rank, Pc::counts_write, Pc::counts_wait);
        return true;
      case Pc::counts_wait:
        return await(next, r, Pc::counts_read, true, [&](int p) { return sequence(next, r, p, kCounts, call) == call; });
      case Pc::counts_read:
        if (next.link[r][rank.peer].counts[call % 2] != call) violate(next, "counts of another call");
        per_peer(rank, Pc::counts_read, Pc::grants_wait);
        return true;
      case Pc::grants_wait:
        return await(next, r, flag_first ? Pc::rows_send : Pc::rows_write, true, [&](int p) {
          return model_.bug == Bug::no_grant_wait || next.link[r][p].grants[rank.epoch % model_.depth] / 16 == rank.epoch + 1;
        });
      case Pc::rows_write:
        there.rows[granted_buffer(next, r, rank.peer)] = static_cast<Byte>(rank.epoch + 1);
        if (flag_first)
          per_peer(rank, Pc::rows_send, Pc::rows_wait);
        else
          rank.pc = Pc::rows_send;
        return true;
      case Pc::rows_send:
        sequence(next, rank.peer, r, kRows, call) = call;
        if (flag_first)
          rank.pc = Pc::rows_write;
        else
          per_peer(rank, Pc::rows_write, Pc::rows_wait);
        return true;
      case Pc::rows_wait:
        return await(next, r, Pc::lease, true, [&](int p) { return sequence(next, r, p, kRows, call) == call; });
      case Pc::lease:
        return take_lease(next, r);
      default:
        return false;
    }
  }

  bool take_lease(State& next, int r) {
    RankState& rank = next.rank[r];
    if (rank.granting != 0) return false;  // the board is locked while it announces
    const Byte buffer = rank.free[0];
    rank.free[0] = rank.free[1];
    --rank.num_free;
    rank.leased[buffer] = static_cast<Byte>(++rank.epoch);
    for (int s = 0; s < model_.ranks; ++s) {
      if (next.link[r][s].rows[buffer] != rank.epoch) violate(next, "rows read before they were written, or in another buffer");
    }
    if (model_.bug == Bug::granted_while_leased) start_granting(rank, buffer);
    rank.pc = Pc::leave;
    return true;
  }

  bool step_combine(State& next, int r) {
    RankState& rank = next.rank[r];
    const auto call = static_cast<Byte>(rank.op + 1);
    LinkState& there = next.link[rank.peer][r];
    const bool pulls = model_.program[rank.op] == Op::pull;
    const bool flag_first = model_.bug == Bug::partials_sent_before_written;
    switch (rank.pc) {
      case Pc::staging_wait:
        return await(next, r, flag_first || pulls ? Pc::partial_send : Pc::partial_write, true,
                     [&](int p) { return model_.bug == Bug::no_staging_wait || next.link[r][p].staging_free >= rank.last_combine; });
      case Pc::partial_write:
        there.staging = call;
        if (flag_first)
          per_peer(rank, Pc::partial_send, Pc::partial_wait);
        else
          rank.pc = Pc::partial_send;
        return true;
      case Pc::partial_send:
        sequence(next, rank.peer, r, kPartials, call) = call;
        rank.last_combine = call;
        if (pulls) rank.last_pull = call;
        if (flag_first && !pulls)
          rank.pc = Pc::partial_write;
        else
          per_peer(rank, pulls ? Pc::partial_send : Pc::partial_write, Pc::partial_wait);
        return true;
      case Pc::partial_wait:
        return await(next, r, Pc::partial_read, true, [&](int p) { return sequence(next, r, p, kPartials, call) == call; });
      case Pc::partial_read:
        if ((pulls ? next.rank[rank.peer].expert_rows : next.link[r][rank.peer].staging) != call)
          violate(next, "partial sums of another call");
        per_peer(rank, Pc::partial_read, Pc::partial_free);
        return true;
      case Pc::partial_free:
        there.staging_free = there.read_done = call;
        per_peer(rank, Pc::partial_free, Pc::leave);
        return true;
      default:
        return false;
    }
  }

  const Model& model_;
  Verdict verdict_;
  std::deque<State> open_;
  std::unordered_set<std::string> seen_;
};

Verdict explore(const Model& model) { return Explorer(model).run(); }

constexpr Op D = Op::dispatch;
constexpr Op L = Op::latency;
constexpr Op C = Op::combine;
constexpr Op P = Op::pull;

void expect_sound(const Model& model, std::size_t at_least) {
  const Verdict verdict = explore(model);
  EXPECT_EQ(verdict.violation, "");
  EXPECT_GE(verdict.states, at_least);  // that it explored anything
}

TEST(ExchangeProtocolModel, DispatchesOfTwoRanks) {
  expect_sound({.ranks = 2, .depth = 1, .program = {D, D, D}}, 1000);
  expect_sound({.ranks = 2, .depth = 2, .program = {D, D, D, D}}, 1000);
  expect_sound({.ranks = 2, .depth = 1, .program = {L, L, L}}, 1000);
  expect_sound({.ranks = 2, .depth = 2, .program = {L, L, D, L}}, 1000);
}

TEST(ExchangeProtocolModel, DispatchesOfThreeRanks) { expect_sound({.ranks = 3, .depth = 1, .program = {D, L}}, 10'000); }

TEST(ExchangeProtocolModel, CombinesByPushAndPull) {
  expect_sound({.ranks = 2, .depth = 1, .program = {C, C, C}}, 100);
  expect_sound({.ranks = 2, .depth = 1, .program = {P, P, P}}, 100);
  expect_sound({.ranks = 2, .depth = 1, .program = {P, C, C, P}}, 100);
  expect_sound({.ranks = 3, .depth = 1, .program = {C, P}}, 1000);
}

TEST(ExchangeProtocolModel, DispatchAndCombineByTurns) {
  expect_sound({.ranks = 2, .depth = 1, .program = {D, C, D, C}}, 1000);
  expect_sound({.ranks = 2, .depth = 2, .program = {D, D, C, P, D}}, 1000);
}

TEST(ExchangeProtocolModel, ARejectedCallStopsNobody) {
  for (const std::vector<Op>& program : {std::vector{D, D, D}, {C, C, C}, {P, P, P}, {D, C, D}, {C, L, C}, {L, L, L}}) {
    for (int op = 0; op < 3; ++op) {
      expect_sound({.ranks = 2, .depth = 1, .program = program, .rejecting_rank = 1, .rejected_op = op}, 100);
    }
  }
  expect_sound({.ranks = 3, .depth = 1, .program = {C, C}, .rejecting_rank = 1, .rejected_op = 0}, 1000);
}

struct Seeded {
  const char* name;
  Model model;
  std::string_view violation;  // how it must show
};

const Seeded kSeeded[] = {
    {"no_grant_wait", {.depth = 1, .program = {L, L}, .bug = Bug::no_grant_wait}, "rows read before"},
    {"no_grant_wait_of_two", {.depth = 2, .program = {D, D, D}, .bug = Bug::no_grant_wait}, "rows"},
    {"rows_sent_before_written", {.program = {D}, .bug = Bug::rows_sent_before_written}, "rows read before"},
    {"granted_while_leased", {.program = {D, D}, .bug = Bug::granted_while_leased}, "rows overwritten while leased"},
    {"no_staging_wait", {.program = {C, C}, .bug = Bug::no_staging_wait}, "partial sums of another call"},
    {"partials_sent_before_written", {.program = {C}, .bug = Bug::partials_sent_before_written}, "partial sums of another call"},
    {"no_read_wait", {.program = {P, P}, .bug = Bug::no_read_wait}, "partial sums of another call"},
    {"abort_keeps_credit", {.program = {C, C}, .bug = Bug::abort_keeps_credit, .rejecting_rank = 1, .rejected_op = 0}, "deadlock"},
};

void PrintTo(const Seeded& seeded, std::ostream* out) { *out << seeded.name; }

class SeededBug : public testing::TestWithParam<Seeded> {};

TEST_P(SeededBug, IsFound) {
  const std::string violation = explore(GetParam().model).violation;
  EXPECT_EQ(violation.substr(0, GetParam().violation.size()), GetParam().violation) << violation;
}

INSTANTIATE_TEST_SUITE_P(ExchangeProtocolModel, SeededBug, testing::ValuesIn(kSeeded), [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace tokenyard
