// The solver against known answers, and against a search that tries everything.

#include <gtest/gtest.h>

#include <array>
#include <numeric>

#include "tokenyard/parallel.h"
#include "unit/expect_usage_error.h"
#include "unit/seeded_random.h"

namespace tokenyard {
namespace {

using testing::expect_usage_error;

TEST(ParallelSolve, KnownAnswers) {
  EXPECT_EQ(solve_parallel({.tp = 8, .ep = 8}).attn_tp, 8);
  EXPECT_EQ(solve_parallel({.dp = 8, .ep = 8}).attn_dp, 8);

  const ParallelConfig both = solve_parallel({.dp = 4, .tp = 2, .ep = 8});
  EXPECT_EQ(both.attn_dp, 4);
  EXPECT_EQ(both.attn_tp, 2);

  EXPECT_EQ(solve_parallel({.tp = 8, .ep = 4}).mlp_tp, 2);

  const ParallelConfig context = solve_parallel({.tp = 4, .ep = 8, .cp = 2});
  EXPECT_EQ(context.attn_tp, 4);
  EXPECT_EQ(context.attn_cp, 2);
  EXPECT_EQ(context.mlp_tp, 1);

  const ParallelConfig one_batch = solve_parallel({.nnodes = 2, .dp = 1, .ep = 16});
  EXPECT_EQ(one_batch.attn_dp, 1);
  EXPECT_EQ(one_batch.attn_tp, 16);

  const ParallelConfig batches = solve_parallel({.nnodes = 2, .dp = 16, .ep = 16});
  EXPECT_EQ(batches.attn_dp, 16);
  EXPECT_EQ(batches.attn_tp, 1);
}

TEST(ParallelSolve, DevicesBeyondWhatIsNeededGoToExpertTp) {
  EXPECT_EQ(solve_parallel({.device_count = 16, .dp = 2, .ep = 8}),
            (ParallelConfig{.device_count = 16, .dp = 2, .tp = 8, .ep = 8, .attn_dp = 2, .attn_tp = 8, .mlp_tp = 2}));
  EXPECT_EQ(solve_parallel({.device_count = 16, .dp = 2, .ep = 8, .outer_dp = 2}),
            (ParallelConfig{.device_count = 16, .dp = 2, .tp = 8, .ep = 8, .outer_dp = 2, .attn_dp = 1, .attn_tp = 8, .mlp_tp = 1}));
}

TEST(ParallelSolve, NothingIsDividedByNodesTwice) {
  const ParallelConfig config = solve_parallel({.nnodes = 2, .tp = 8, .ep = 4});
  EXPECT_EQ(config.device_count, 8);
  EXPECT_EQ(config.coordinates(3).node, 0);
  EXPECT_EQ(config.coordinates(4).node, 1);
}

TEST(ParallelSolve, EachInvariantHasItsText) {
  expect_usage_error([] { solve_parallel({.dp = 1, .tp = 1, .ep = 8}); },
                     {"device_count = 1 is not outer_dp 1 * ep 8 * mlp_tp 1 = 8", "device_count was left out", "leave tp out"});
  expect_usage_error([] { solve_parallel({.device_count = 12, .dp = 8}); },
                     {"device_count = 12 is not outer_dp", "attn_dp", "multiple of dp * cp = 8"});
  expect_usage_error([] { solve_parallel({.nnodes = 3, .tp = 8, .ep = 8}); }, {"device_count = 8 is no multiple of nnodes = 3"});
  expect_usage_error([] { solve_parallel({.cp = 4, .attn_cp = 2}); }, {"attn_cp = 2 is not cp = 4"});
  expect_usage_error([] { solve_parallel({.dp = 3, .outer_dp = 2}); },
                     {"dp = 3 is not outer_dp 2 * attn_dp 1 = 2", "multiple of outer_dp"});
  expect_usage_error([] { solve_parallel({.device_count = 8, .tp = 4}); }, {"tp = 4 is no multiple of attn_tp = 8", "use tp 8"});
  expect_usage_error([] { solve_parallel({.device_count = 8, .dp = 2, .tp = 4, .outer_dp = 1}); },
                     {"tp = 4 is no multiple of mlp_tp = 8", "more ep"});
  expect_usage_error([] { solve_parallel({.device_count = 6, .tp = 6, .ep = 3, .cp = 2}); },
                     {"tp = 6 is neither attn_tp = 3 nor mlp_tp = 2", "cp that divides ep"});
  expect_usage_error([] { solve_parallel({.ep = 0}); }, {"ep = 0", "1..65535"});
  expect_usage_error([] { solve_parallel({.mlp_tp = -2}); }, {"mlp_tp = -2"});
  expect_usage_error([] { solve_parallel({.nnodes = 65536}); }, {"nnodes = 65536"});
  expect_usage_error([] { solve_parallel({.dp = 65535, .tp = 65535, .ep = 65535}); }, {"more than 65535 devices"});
  expect_usage_error([] { solve_parallel({.dp = 65535, .ep = 4, .cp = 2}); }, {"dp = 65535 * cp = 2", "more than 65535 devices"});
  for (const Transport transport : {Transport::inproc, Transport::shm, Transport::cuda_peer}) {
    expect_usage_error([&] { solve_parallel({.nnodes = 2, .tp = 8, .transport = transport}); },
                       {"transport " + std::string(name(transport)), "nnodes = 2"});
    EXPECT_EQ(solve_parallel({.tp = 8, .transport = transport}).device_count, 8);
  }
  expect_usage_error([] { check_parallel({.device_count = 4, .tp = 4}); }, {"device_count = 4 is not outer_dp 1 * attn_dp 1 * attn_tp 1"});
  expect_usage_error([] { check_parallel({.device_count = 0}); }, {"device_count = 0"});
}

TEST(ParallelSolve, WrongExplicitSizesAreNotReplaced) {
  expect_usage_error([] { solve_parallel({.tp = 8, .ep = 4, .mlp_tp = 4}); }, {"is not outer_dp 1 * ep 4 * mlp_tp 4 = 16"});
  expect_usage_error([] { solve_parallel({.device_count = 8, .attn_tp = 3}); }, {"device_count = 8", "attn_tp 3"});
  EXPECT_EQ(solve_parallel({.ep = 8, .outer_dp = 2, .attn_dp = 4, .attn_tp = 2}),
            (ParallelConfig{.device_count = 16, .dp = 8, .tp = 2, .ep = 8, .outer_dp = 2, .attn_dp = 4, .attn_tp = 2}));
}

// From here on: everything that satisfies the specification up to 64 devices, found by trying all products.

constexpr int kMostDevices = 64;

std::vector<ParallelConfig> everything_valid() {
  std::vector<ParallelConfig> all;
  for (int devices = 1; devices <= kMostDevices; ++devices) {
    for (int outer = 1; outer <= devices; ++outer) {
      for (int dp = 1; outer * dp <= devices; ++dp) {
        for (int cp = 1; outer * dp * cp <= devices; ++cp) {
          for (int ep = 1; outer * ep <= devices; ++ep) {
            if (devices % (outer * dp * cp) != 0 || devices % (outer * ep) != 0) continue;
            const int attn_tp = devices / (outer * dp * cp);
            const int mlp_tp = devices / (outer * ep);
            const int tp = std::max(attn_tp, mlp_tp);
            if (tp % attn_tp != 0 || tp % mlp_tp != 0) continue;
            all.push_back({1, devices, outer * dp, tp, ep, cp, outer, dp, attn_tp, cp, mlp_tp});
          }
        }
      }
    }
  }
  return all;
}

const std::vector<ParallelConfig>& valid() {
  static const std::vector<ParallelConfig> all = everything_valid();
  return all;
}

bool agrees(const std::optional<int>& given, int value) { return !given || *given == value; }

// The specification's choice, literally: defaults, then smallest tp, then the largest divisor, then the fewest outer replicas.
std::optional<ParallelConfig> best_of(const std::vector<ParallelConfig>& candidates, const ParallelRequest& r) {
  const int dp = r.dp.value_or(r.outer_dp.value_or(1) * r.attn_dp.value_or(1));
  const int cp = r.cp.value_or(r.attn_cp.value_or(1));
  std::optional<ParallelConfig> best;
  for (const ParallelConfig& c : candidates) {
    if (c.dp != dp || c.cp != cp || c.ep != r.ep.value_or(1) || c.device_count % r.nnodes != 0) continue;
    if (!agrees(r.device_count, c.device_count) || !agrees(r.tp, c.tp) || !agrees(r.outer_dp, c.outer_dp)) continue;
    if (!agrees(r.attn_dp, c.attn_dp) || !agrees(r.attn_tp, c.attn_tp) || !agrees(r.attn_cp, c.attn_cp)) continue;
    if (!agrees(r.mlp_tp, c.mlp_tp)) continue;
    if (!r.device_count && c.dp * c.tp * std::gcd(c.cp, c.ep) % c.device_count != 0) continue;
    const auto rank = [](const ParallelConfig& x) { return std::array{x.tp, -x.device_count, x.outer_dp}; };
    if (!best || rank(c) < rank(*best)) best = c;
  }
  if (best) best->nnodes = r.nnodes;
  return best;
}

std::optional<ParallelConfig> solved(const ParallelRequest& request) {
  try {
    return solve_parallel(request);
  } catch (const UsageError&) {
    return std::nullopt;
  }
}

// Beyond 64 devices the list says nothing but this: the solver may only have found something better there.
void expect_best(const std::vector<ParallelConfig>& candidates, const ParallelRequest& request) {
  const std::optional<ParallelConfig> best = best_of(candidates, request);
  const std::optional<ParallelConfig> answer = solved(request);
  if (answer && answer->device_count > kMostDevices) {
    EXPECT_TRUE(!best || answer->tp <= best->tp);
    EXPECT_EQ(answer->outer_dp * answer->attn_dp * answer->attn_tp * answer->attn_cp, answer->device_count);
    EXPECT_EQ(answer->outer_dp * answer->ep * answer->mlp_tp, answer->device_count);
    return;
  }
  ASSERT_EQ(answer.has_value(), best.has_value());
  if (best) {
    ASSERT_EQ(*answer, *best) << answer->to_json() << best->to_json();
  }
}

std::string describe(const ParallelRequest& r) {
  std::string text;
  const auto add = [&text](const char* size, std::optional<int> value) {
    if (value) text += std::string(size) + "=" + std::to_string(*value) + " ";
  };
  add("nnodes", r.nnodes), add("device_count", r.device_count), add("dp", r.dp), add("tp", r.tp), add("ep", r.ep), add("cp", r.cp);
  add("outer_dp", r.outer_dp), add("attn_dp", r.attn_dp), add("attn_tp", r.attn_tp), add("attn_cp", r.attn_cp), add("mlp_tp", r.mlp_tp);
  return text;
}

TEST(ParallelSolve, EveryValidConfigurationIsAccepted) {
  EXPECT_GT(valid().size(), 1000U);
  for (const ParallelConfig& c : valid()) {
    check_parallel(c);
    const ParallelRequest all = {.device_count = c.device_count, .dp = c.dp, .tp = c.tp, .ep = c.ep, .cp = c.cp, .outer_dp = c.outer_dp};
    ASSERT_EQ(solve_parallel(all), c) << describe(all);
  }
}

// Every dp, cp and ep up to 64, with device_count and tp given or left out (not both: then most answers have more than 64 devices; the next
// test does that).
TEST(ParallelSolve, EveryRequestUpTo64DevicesGetsTheBest) {
  std::int64_t requests = 0;
  for (int dp = 1; dp <= kMostDevices; ++dp) {
    for (int cp = 1; dp * cp <= kMostDevices; ++cp) {
      for (int ep = 1; ep <= kMostDevices; ep += TY_SANITIZED ? 7 : 1) {
        std::vector<ParallelConfig> candidates;
        for (const ParallelConfig& c : valid()) {
          if (c.dp == dp && c.cp == cp && c.ep == ep) candidates.push_back(c);
        }
        for (const int devices : {0, 1, 2, 6, 16, 24, 60, 64}) {
          for (const int tp : {0, 1, 2, 3, 4, 8, 64}) {
            if (devices == 0 && tp == 0) continue;
            ParallelRequest request = {.dp = dp, .ep = ep, .cp = cp};
            if (devices > 0) request.device_count = devices;
            if (tp > 0) request.tp = tp;
            expect_best(candidates, request);
            ASSERT_FALSE(HasFatalFailure() || HasNonfatalFailure()) << describe(request);
            ++requests;
          }
        }
      }
    }
  }
  EXPECT_GT(requests, 100'000);
}

TEST(ParallelSolve, AnySubsetOfSizesGetsTheBest) {
  testing::SeededRandom random;
  for (int i = 0; i < 20'000; ++i) {
    const ParallelConfig& c = valid()[static_cast<std::size_t>(random.between(0, std::ssize(valid()) - 1))];
    const auto maybe = [&random](int value) {
      return random.one_in(2) ? std::optional(random.one_in(12) ? value + 1 : value) : std::nullopt;
    };
    ParallelRequest request = {.nnodes = random.pick({1, 1, 2, 3}), .device_count = maybe(c.device_count)};
    request.dp = maybe(c.dp), request.tp = maybe(c.tp), request.ep = maybe(c.ep), request.cp = maybe(c.cp);
    request.outer_dp = maybe(c.outer_dp), request.attn_dp = maybe(c.attn_dp), request.attn_tp = maybe(c.attn_tp);
    request.attn_cp = maybe(c.attn_cp), request.mlp_tp = maybe(c.mlp_tp);
    expect_best(valid(), request);
    ASSERT_FALSE(HasFatalFailure() || HasNonfatalFailure()) << describe(request);
  }
}

}  // namespace
}  // namespace tokenyard
