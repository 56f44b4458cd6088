#include <gtest/gtest.h>

#include "exchange/store_choice.h"

namespace tokenyard::exchange_internal {
namespace {

// A machine on which both kinds of stores take a known time.
struct Machine {
  double ordinary;
  double streaming;
};

// How many of `calls` stream.
int run(StoreChoice& choice, Machine machine, int calls) {
  int streamed = 0;
  for (int i = 0; i < calls; ++i) {
    const bool stream = choice.next();
    streamed += stream ? 1 : 0;
    choice.add(stream, stream ? machine.streaming : machine.ordinary);
  }
  return streamed;
}

TEST(StoreChoice, TriesBothKindsBeforeItChooses) {
  StoreChoice choice;
  EXPECT_EQ(run(choice, {1, 1}, 2 * StoreChoice::kSamples), StoreChoice::kSamples);
}

TEST(StoreChoice, TakesTheFasterKindAndTriesTheOtherNowAndThen) {
  constexpr int kProbes = 10;
  for (const Machine machine : {Machine{4, 1}, Machine{1, 1.5}}) {
    StoreChoice choice;
    run(choice, machine, 2 * StoreChoice::kSamples);
    const int streamed = run(choice, machine, kProbes * StoreChoice::kProbeEvery);
    EXPECT_EQ(machine.streaming < machine.ordinary ? kProbes * (StoreChoice::kProbeEvery - 1) : kProbes, streamed);
  }
}

TEST(StoreChoice, FollowsRanksThatAreMoved) {
  StoreChoice choice;
  run(choice, {1, 1.5}, 1000);
  // A slower present kind is noticed at once, the other kind's gain after a few probes.
  run(choice, {4, 1.5}, 2 * StoreChoice::kSamples);
  EXPECT_GT(run(choice, {4, 1.5}, 100), 90);
  run(choice, {1, 1.5}, StoreChoice::kSamples * StoreChoice::kProbeEvery);
  EXPECT_LT(run(choice, {1, 1.5}, 100), 10);
}

TEST(StoreChoice, ALostCoreSaysNothingOfTheStores) {
  StoreChoice choice;
  run(choice, {1, 2}, 100);
  for (int i = 0; i < StoreChoice::kSamples / 2; ++i) choice.add(false, 1000);
  EXPECT_FALSE(choice.next());
}

TEST(StoreChoice, RowsOfALargeBatchAlwaysGoPastTheCaches) {
  StoreChoice choice;
  constexpr std::int64_t kLarge = std::int64_t{64} << 20;
  for (int i = 0; i < 3; ++i) {
    const StoreChoice::Stores stores(choice, kLarge);
    EXPECT_TRUE(stores.stream_to_peers());
    EXPECT_TRUE(stores.stream_to_self());
  }
  const StoreChoice::Stores small(choice, 4096);  // the first that counts
  EXPECT_FALSE(small.stream_to_peers());
  EXPECT_FALSE(small.stream_to_self());
}

}  // namespace
}  // namespace tokenyard::exchange_internal
