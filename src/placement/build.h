#pragma once
// Every builder ends here: check a list of replicas, then flatten it for kernels.

#include <vector>

#include "placement/table.h"

namespace tokenyard::placement_internal {

constexpr int kMaxRanks = 65535;
constexpr int kMaxExperts = 65536;
constexpr int kMaxLocalExperts = 65535;
constexpr std::uint32_t kMaxShare = 65535;
// The dense table is bounded, so that one expert with many replicas and another with many shards cannot ask for terabytes.
constexpr std::int64_t kMaxTableEntries = std::int64_t{1} << 24;

// UsageError unless both are in range.
void check_sizes(std::int64_t num_experts, std::int64_t ranks);
// Whether an expert may have no replica: only after its ranks were lost.
enum class Orphans : bool { refused, allowed };
// UsageError, naming expert, replica, shard and rank, for the first fault.
Table build_table(int ranks, const std::vector<std::vector<Replica>>& replicas, Orphans orphans = Orphans::refused);

}  // namespace tokenyard::placement_internal
