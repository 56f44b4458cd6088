#pragma once
// One configuration of an exchange: a value for each factor, and the seed that everything random is drawn from.

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "tokenyard/options.h"

namespace tokenyard::exchange_test {

enum Factor : int {
  kLayout,
  kMode,
  kSizing,
  kDtype,
  kOrder,
  kGroups,
  kMemory,
  kThreads,
  kWeighting,
  kFold,
  kCached,
  kCopyOut,
  kQuantise,
  kScales,
  kValidate,
  kDepth,
  kRanks,
  kExperts,
  kTopK,
  kRowBytes,
  kTokens,
  kIds,
  kPlacement,
  kStrided,
  kReceiveRows,
  kExpertCapacity,
  kAlignment,
  kZeroPadding,
  kGatherMap,
  kTopkWeights,
  kIdsDtype,
  kBias,
  kOut,
  kRowWeights,
  kTokenBase,
  kPhases,
  kExpertRows,
  kNumFactors
};

// Values of the factors that are not numbers and not enumerations of the library.
enum class Groups : int { none, one, halves, each };
enum class CopyOut : int { lease, own, caller };
enum class Quantising : int { none, float32, float32_pow2, ue8m0 };
enum class Scales : int { none, dense, strided };
enum class Tokens : int { all_full, uneven, one_empty, several_empty, all_empty };
enum class Ids : int { random, skewed, all_negative, one_expert, duplicates, some_out_of_range };
enum class Placed : int { uniform, tensor_parallel, replicas, sharded_replicas, empty_ranks };
enum class ReceiveRows : int { bound, tight };
enum class ExpertCapacity : int { none, tight, drop };
enum class IdsDtype : int { int64, int32, one_dimension };
enum class Out : int { own, caller, caller_float32 };

struct Case {
  std::uint64_t seed = 1;
  std::array<std::int64_t, kNumFactors> values{};
  Device device = Device::cpu;

  std::int64_t number(Factor factor) const { return values[factor]; }
  bool is(Factor factor) const { return values[factor] != 0; }
  template <class Enum>
  Enum as(Factor factor) const {
    return static_cast<Enum>(values[factor]);
  }
  std::int64_t max_tokens() const;  // M, as many as keep the case small
};

// "seed=7 layout=token_major mode=latency ...": whatever replays and explains the case.
std::string describe(const Case& c);

// Cases in which every pair of factor values that can go together does so at least once.
std::vector<Case> pairwise_cases(std::uint64_t seed, Device device = Device::cpu);
// Any legal case.
Case random_case(std::uint64_t seed, Device device = Device::cpu);

}  // namespace tokenyard::exchange_test
