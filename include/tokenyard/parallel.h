#pragma once
// Parallel configuration: from the few sizes that a caller cares about to all of them, and to who is who. Pure: nothing here
// depends on the machine, so every rank computes the same answer for itself.
//
//   device_count = outer_dp * attn_dp * attn_tp * attn_cp      (how attention divides the ranks)
//   device_count = outer_dp * ep * mlp_tp                      (how the experts divide the same ranks)
//   attn_cp = cp, dp = outer_dp * attn_dp, tp = max(attn_tp, mlp_tp) and a multiple of both
//
// `mlp_tp` is the tensor parallelism of the experts (some engines use the name for dense MLPs).

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/options.h"

namespace tokenyard {

// A size that is given is binding, one left out is derived. All are in 1..65535.
struct ParallelRequest {
  int nnodes = 1;
  std::optional<int> device_count{};  // ranks of all nodes together
  std::optional<int> dp{};            // default: outer_dp * attn_dp where given, else 1
  std::optional<int> tp{};            // default: the smallest that works
  std::optional<int> ep{};            // default 1
  std::optional<int> cp{};            // default: attn_cp where given, else 1
  std::optional<int> outer_dp{}, attn_dp{}, attn_tp{}, attn_cp{}, mlp_tp{};
  Transport transport = Transport::automatic;  // inproc, shm and cuda_peer do not leave a host
};

// Where a rank is: (outer, attn_dp, attn_tp, attn_cp) for attention, (outer, ep, mlp_tp) for the experts; the last varies fastest.
struct RankCoordinates {
  int rank = 0;
  int node = 0;  // a node holds consecutive ranks
  int outer = 0;
  int attn_dp = 0;
  int attn_tp = 0;
  int attn_cp = 0;
  int ep = 0;
  int mlp_tp = 0;
  bool operator==(const RankCoordinates&) const = default;
};

// The worlds that a layer meets in. Every rank is in exactly one of each kind.
enum class SubWorld : std::uint8_t {
  attention,  // shares the tokens of one attention replica: attn_tp * attn_cp ranks
  ep,         // one shard of every expert: ep ranks; the exchange of gathered expert TP
  tp,         // the shards of one window of experts: mlp_tp ranks
  ep_tp,      // all experts: ep * mlp_tp ranks; the exchange of virtual expert TP. outer_dp of them are independent exchanges
  outer,      // holds the same weights and sits at the same place of its ep_tp: outer_dp ranks
};
std::string_view name(SubWorld kind);

// The arguments of World::split.
struct SplitArguments {
  int color = 0;  // which of the worlds of this kind: 0, 1, ...
  int key = 0;    // the rank in it
  bool operator==(const SplitArguments&) const = default;
};

struct ParallelConfig {
  int nnodes = 1;
  int device_count = 1;
  int dp = 1;
  int tp = 1;
  int ep = 1;
  int cp = 1;
  int outer_dp = 1;
  int attn_dp = 1;
  int attn_tp = 1;
  int attn_cp = 1;
  int mlp_tp = 1;
  bool operator==(const ParallelConfig&) const = default;

  // UsageError unless the configuration passes check_parallel() and rank is in 0..device_count - 1.
  RankCoordinates coordinates(int rank) const;
  SplitArguments split_arguments(SubWorld kind, int rank) const;
  int sub_world_size(SubWorld kind) const;  // ranks of one world of this kind
  // {"nnodes": 1, ..., "mlp_tp": 2, "ranks": [{"rank": 0, "node": 0, "outer": 0, ...}, ...]}
  std::string to_json() const;
};

// Of all configurations that hold every given size and every invariant: the one with the smallest tp, of those the one with the
// most devices, of those the one with the fewest outer replicas (so devices beyond what is needed go to expert TP; name outer_dp
// to get replicas). UsageError names the invariant that cannot hold, with its numbers.
//
// The experts' placement on one ep_tp world is Placement::tensor_parallel(num_experts, config.ep, config.mlp_tp).
ParallelConfig solve_parallel(const ParallelRequest& request);

// UsageError, naming the first invariant that does not hold and its numbers.
void check_parallel(const ParallelConfig& config);

}  // namespace tokenyard
