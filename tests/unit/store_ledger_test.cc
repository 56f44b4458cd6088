#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "world/ledger.h"

namespace tokenyard::world_internal {
namespace {

using Time = Deadline::Clock::time_point;

// A ledger, and what it has delivered.
struct Book {
  std::map<std::pair<int, GatherKey>, Ledger::Outcome> outcomes;
  int deliveries = 0;
  std::vector<int> announced;  // as lost
  Ledger ledger;

  explicit Book(int size)
      : ledger(
            size,
            [this](int rank, GatherKey key, const Ledger::Outcome& outcome) {
              ++deliveries;
              EXPECT_TRUE(outcomes.emplace(std::pair(rank, key), outcome).second) << "rank " << rank << " was answered twice";
            },
            [this](int rank) { announced.push_back(rank); }) {}

  std::optional<std::string> arrive(int rank, const Call& call, int timeout_ms = 60'000) {
    return ledger.arrive(rank, call, part_of(rank), Deadline::after_ms(timeout_ms));
  }
  static SharedPart part_of(int rank) {
    return std::make_shared<const Part>(Part{.bytes = {static_cast<std::byte>(rank)}, .object = nullptr});
  }
  const Ledger::Outcome& outcome(int rank, const Call& call) { return outcomes.at({rank, call.key}); }
  bool answered(int rank, const Call& call) const { return outcomes.contains({rank, call.key}); }
};

Time long_from_now() { return Deadline::Clock::now() + std::chrono::hours(24); }

Call gather_of(std::vector<int> members, std::uint64_t sequence = 0) {
  return {.key = {kRootGeneration, sequence}, .phase = Phase::gather, .members = std::move(members)};
}

TEST(StoreLedger, AllMembersGetAllPartsInTheOrderOfTheMembers) {
  Book book(5);
  const Call call = gather_of({4, 0, 2});
  for (const int rank : {0, 2}) EXPECT_FALSE(book.arrive(rank, call));
  EXPECT_EQ(book.deliveries, 0);
  EXPECT_FALSE(book.arrive(4, call));
  EXPECT_EQ(book.deliveries, 3);
  for (const int rank : {0, 2, 4}) {
    const auto& outcome = book.outcome(rank, call);
    ASSERT_TRUE(outcome.has_value());
    ASSERT_EQ(outcome->parts.size(), 3U);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(outcome->parts[i]->bytes[0], static_cast<std::byte>(call.members[i]));
    EXPECT_EQ(outcome->serial, book.outcome(0, call)->serial);
  }
  EXPECT_EQ(book.ledger.open_gathers(), 0U);
}

TEST(StoreLedger, SerialsOfGathersNeverOverlap) {
  Book book(4);
  std::set<std::uint64_t> seen{kRootGeneration};
  for (std::uint64_t sequence = 0; sequence < 20; ++sequence) {
    const Call call = gather_of(sequence % 2 == 0 ? std::vector{0, 1, 2, 3} : std::vector{1, 3}, sequence);
    for (const int rank : call.members) EXPECT_FALSE(book.arrive(rank, call));
    const std::uint64_t serial = book.outcome(1, call)->serial;
    for (std::size_t i = 0; i < call.members.size(); ++i) EXPECT_TRUE(seen.insert(serial + i).second);
  }
}

TEST(StoreLedger, TheDeadlineNamesAllMissingAndBlamesTheLowest) {
  Book book(6);
  const Call call = gather_of({5, 3, 1, 0});  // their ranks in this world: 0, 1, 2, 3
  EXPECT_FALSE(book.arrive(3, call, 250));
  EXPECT_FALSE(book.arrive(0, call, 90'000));
  book.ledger.expire(Deadline::Clock::now());
  EXPECT_EQ(book.deliveries, 0);
  ASSERT_TRUE(book.ledger.next_deadline());
  book.ledger.expire(*book.ledger.next_deadline());
  ASSERT_EQ(book.deliveries, 2) << "the earliest deadline ends the gather for all";
  const Failure& failure = book.outcome(0, call).error();
  EXPECT_EQ(failure.kind, FailureKind::timeout);
  EXPECT_EQ(failure.phase, Phase::gather);
  EXPECT_EQ(failure.rank, 3);
  EXPECT_EQ(failure.peer, 0);
  EXPECT_EQ(failure.expected, 4);
  EXPECT_EQ(failure.seen, 2);
  EXPECT_NE(failure.detail.find("missing: ranks 0, 2;"), std::string::npos) << failure.detail;
  EXPECT_NE(failure.detail.find("rank 1 waited 250 ms"), std::string::npos) << failure.detail;
  EXPECT_EQ(book.outcome(3, call).error().rank, 1);
  EXPECT_FALSE(book.ledger.next_deadline());

  // A rank that comes late learns at once that it was given up, and the book forgets the gather after the last one.
  EXPECT_FALSE(book.arrive(5, call));
  EXPECT_EQ(book.outcome(5, call).error().kind, FailureKind::timeout);
  EXPECT_EQ(book.outcome(5, call).error().rank, 0);
  EXPECT_EQ(book.ledger.open_gathers(), 1U);
  EXPECT_FALSE(book.arrive(1, call));
  EXPECT_EQ(book.ledger.open_gathers(), 0U);
  // The next call is another matter.
  const Call next = gather_of({5, 3, 1, 0}, 1);
  for (const int rank : next.members) EXPECT_FALSE(book.arrive(rank, next));
  EXPECT_TRUE(book.outcome(5, next).has_value());
}

TEST(StoreLedger, ALostRankFailsPendingAndLaterGathersThatIncludeIt) {
  Book book(4);
  const Call all = gather_of({0, 1, 2, 3});
  const Call without = {.key = {9, 0}, .phase = Phase::barrier, .members = {0, 1}};
  EXPECT_FALSE(book.arrive(0, all));
  EXPECT_FALSE(book.arrive(3, all));
  EXPECT_FALSE(book.arrive(0, without));
  EXPECT_TRUE(book.ledger.lose(3, "was killed"));
  EXPECT_FALSE(book.ledger.lose(3, "again"));
  EXPECT_TRUE(book.ledger.lost(3));
  EXPECT_EQ(book.announced, std::vector<int>{3});
  ASSERT_TRUE(book.answered(0, all));
  EXPECT_EQ(book.outcome(0, all).error().kind, FailureKind::peer_lost);
  EXPECT_EQ(book.outcome(0, all).error().peer, 3);
  EXPECT_EQ(book.outcome(0, all).error().detail, "rank 3 was killed");
  EXPECT_FALSE(book.arrive(1, all));
  EXPECT_EQ(book.outcome(1, all).error().peer, 3);
  const Call later = gather_of({0, 1, 2, 3}, 1);
  EXPECT_FALSE(book.arrive(2, later));
  EXPECT_EQ(book.outcome(2, later).error().peer, 3);
  EXPECT_FALSE(book.answered(0, without));
  EXPECT_FALSE(book.arrive(1, without));
  EXPECT_TRUE(book.outcome(0, without).has_value());
}

TEST(StoreLedger, AClosedRankIsNamedButNotLost) {
  Book book(3);
  EXPECT_TRUE(book.ledger.close(1));
  EXPECT_FALSE(book.ledger.lose(1, "ended with exit code 0")) << "it had gone in order";
  EXPECT_FALSE(book.ledger.lost(1));
  EXPECT_TRUE(book.announced.empty());
  const Call call = gather_of({0, 1, 2});
  EXPECT_FALSE(book.arrive(2, call));
  EXPECT_EQ(book.outcome(2, call).error().kind, FailureKind::peer_lost);
  EXPECT_EQ(book.outcome(2, call).error().detail, "rank 1 has closed its world");
}

TEST(StoreLedger, AllThatAreGoneAreNamed) {
  Book book(4);
  book.ledger.lose(2, "was killed");
  book.ledger.close(0);
  const Call call = gather_of({3, 2, 0});
  EXPECT_FALSE(book.arrive(3, call));
  EXPECT_EQ(book.outcome(3, call).error().peer, 1);
  EXPECT_EQ(book.outcome(3, call).error().detail, "rank 1 was killed; rank 2 has closed its world");
}

Call meeting_of(std::vector<int> members) {
  return {.key = {kRootGeneration, kRecoverSequence}, .phase = Phase::recover, .members = std::move(members)};
}

TEST(StoreLedger, SurvivorsMeetWithoutThoseThatAreGone) {
  Book book(5);
  const Call call = meeting_of({4, 3, 2, 1});
  book.ledger.lose(2, "was killed before");
  EXPECT_FALSE(book.arrive(1, call));
  EXPECT_FALSE(book.arrive(4, call));
  EXPECT_EQ(book.deliveries, 0);
  book.ledger.lose(3, "was killed while they met");
  for (const int rank : {4, 1}) {
    const auto& outcome = book.outcome(rank, call);
    ASSERT_TRUE(outcome.has_value());
    ASSERT_EQ(outcome->parts.size(), 2U);
    EXPECT_EQ(outcome->parts[0]->bytes[0], std::byte{4});
    EXPECT_EQ(outcome->parts[1]->bytes[0], std::byte{1});
  }
  EXPECT_EQ(book.ledger.open_gathers(), 0U);
}

TEST(StoreLedger, WhoDoesNotComeToTheMeetingIsLost) {
  Book book(3);
  const Call call = meeting_of({0, 1, 2});
  EXPECT_FALSE(book.arrive(2, call));
  EXPECT_FALSE(book.arrive(0, call));
  book.ledger.expire(long_from_now());
  EXPECT_EQ(book.announced, std::vector<int>{1});
  EXPECT_TRUE(book.ledger.lost(1));
  EXPECT_EQ(book.outcome(0, call)->parts.size(), 2U);
  EXPECT_FALSE(book.arrive(1, call));
  EXPECT_EQ(book.outcome(1, call).error().detail, "rank 1 did not come when the survivors met");
  EXPECT_EQ(book.ledger.open_gathers(), 0U);
}

// A rank that gives up while another thread of it waits for the others must not wait for ever.
TEST(StoreLedger, WhoLeavesTheMeetingIsToldSo) {
  Book book(3);
  const Call call = meeting_of({0, 1, 2});
  EXPECT_FALSE(book.arrive(1, call));
  book.ledger.lose(1, "left its world");
  EXPECT_FALSE(book.arrive(0, call));
  EXPECT_FALSE(book.arrive(2, call));
  EXPECT_EQ(book.outcome(1, call).error().kind, FailureKind::peer_lost);
  EXPECT_EQ(book.outcome(0, call)->parts.size(), 2U);
  EXPECT_EQ(book.deliveries, 3);
}

TEST(StoreLedger, DifferentCallsAreAMismatchThatNamesBoth) {
  Book book(3);
  const Call gather = gather_of({0, 1, 2});
  Call barrier = gather;
  barrier.phase = Phase::barrier;
  EXPECT_FALSE(book.arrive(0, gather));
  EXPECT_FALSE(book.arrive(2, barrier));
  for (const int rank : {0, 2}) {
    const Failure& failure = book.outcome(rank, gather).error();
    EXPECT_EQ(failure.kind, FailureKind::mismatch);
    EXPECT_NE(failure.detail.find("rank 2 called barrier where rank 0 called gather"), std::string::npos) << failure.detail;
  }
  EXPECT_FALSE(book.arrive(1, gather));
  EXPECT_EQ(book.outcome(1, gather).error().kind, FailureKind::mismatch);
  EXPECT_EQ(book.ledger.open_gathers(), 0U);
}

TEST(StoreLedger, ARankReachesNoGatherThatItIsNoMemberOf) {
  Book book(4);
  const Call call = gather_of({0, 1});
  EXPECT_FALSE(book.arrive(0, call));
  Call same_key = gather_of({3, 0, 1});
  same_key.phase = Phase::barrier;
  EXPECT_FALSE(book.arrive(3, same_key));
  book.ledger.lose(3, "was killed");
  EXPECT_FALSE(book.arrive(1, call));
  EXPECT_TRUE(book.outcome(0, call).has_value());
  EXPECT_TRUE(book.outcome(1, call).has_value());
}

TEST(StoreLedger, MalformedCallsAreRefusedAndChangeNothing) {
  Book book(3);
  const Call good = gather_of({0, 1});
  EXPECT_FALSE(book.arrive(0, good));
  EXPECT_EQ(book.arrive(0, good), "rank 0 made call 0 of world 1 twice");
  EXPECT_EQ(book.arrive(2, gather_of({0, 1}, 5)), "rank 2 is no member of its own call");
  EXPECT_EQ(book.arrive(2, gather_of({2, 3}, 5)), "member 3 of a world of 3 ranks");
  EXPECT_EQ(book.arrive(2, gather_of({2, -1}, 5)), "member -1 of a world of 3 ranks");
  EXPECT_EQ(book.arrive(2, gather_of({2, 0, 2}, 5)), "rank 2 is named twice as a member");
  const auto oversized = std::make_shared<const Part>(Part{.bytes = std::vector<std::byte>(kMaxPartBytes + 1), .object = nullptr});
  EXPECT_TRUE(book.ledger.arrive(2, gather_of({2}, 5), oversized, Deadline::after_ms(1)));
  EXPECT_EQ(book.deliveries, 0);
  EXPECT_EQ(book.ledger.open_gathers(), 1U);
  EXPECT_FALSE(book.arrive(1, good));
  EXPECT_TRUE(book.outcome(0, good).has_value());
}

TEST(StoreLedger, ListsOfRanksStayShort) {
  EXPECT_EQ(list_ranks({3}), "rank 3");
  EXPECT_EQ(list_ranks({0, 2}), "ranks 0, 2");
  std::vector<int> many(100);
  for (int i = 0; i < 100; ++i) many[i] = i;
  EXPECT_EQ(list_ranks(many), "ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 and 84 more");
}

// Random worlds, arrivals, deaths and expiries: every arrival is answered exactly once, the members of one gather agree on
// how it ended, and in the end the book is empty.
TEST(StoreLedger, RandomHistoriesAnswerEveryArrivalOnce) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int history = 0; history < 300; ++history) {
    const int size = 1 + static_cast<int>(random() % 6);
    Book book(size);
    std::vector<Call> calls;
    std::vector<std::pair<int, std::size_t>> arrivals;  // rank, call; of one rank in the order of the calls
    for (std::uint64_t sequence = 0; sequence < 8; ++sequence) {
      std::vector<int> members;
      for (int rank = 0; rank < size; ++rank) {
        if (random() % 3 != 0) members.push_back(rank);
      }
      std::shuffle(members.begin(), members.end(), random);
      if (members.empty()) continue;
      for (const int rank : members) arrivals.emplace_back(rank, calls.size());
      calls.push_back(gather_of(members, sequence));
      if (random() % 4 == 0) calls.back().phase = Phase::recover;
    }
    std::shuffle(arrivals.begin(), arrivals.end(), random);
    int made = 0;
    for (const auto& [rank, call] : arrivals) {
      if (random() % 10 == 0) book.ledger.lose(static_cast<int>(random() % size), "died");
      if (random() % 20 == 0) book.ledger.close(static_cast<int>(random() % size));
      if (random() % 20 == 0) book.ledger.expire(long_from_now());
      ASSERT_FALSE(book.arrive(rank, calls[call]));
      ++made;
    }
    book.ledger.expire(long_from_now());
    EXPECT_EQ(book.deliveries, made);
    EXPECT_EQ(book.ledger.open_gathers(), 0U);
    EXPECT_FALSE(book.ledger.next_deadline());
    for (const Call& call : calls) {
      if (call.phase == Phase::recover) continue;  // those that are gone have an error, the others each other
      for (const int rank : call.members) {
        EXPECT_EQ(book.outcome(rank, call).has_value(), book.outcome(call.members[0], call).has_value());
      }
    }
  }
}

}  // namespace
}  // namespace tokenyard::world_internal
