#pragma once
// Weights of experts: which elements of a full tensor a rank holds, where they are in a checkpoint, and how they get from one
// layout of ranks to another. Everything moves bits; nothing here rounds.
//
// Full tensors, whatever a checkpoint makes of them (E experts, I = expert_width, H = hidden_size, row-major):
//   w13 [E, 2, I, H] = gate and up of each expert, w2 [E, H, I], w13_bias [E, 2, I], w2_bias [E, H],
//   w13_scale [E, 2, ceil(I / block), ceil(H / block)], w2_scale [E, ceil(H / block), ceil(I / block)].
// Tensor parallelism cuts I: rows of w13 inside each (expert, projection), columns of w2. w2_bias is held by shard 0 alone.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tokenyard/collective.h"
#include "tokenyard/placement.h"
#include "tokenyard/safetensors.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard {

// Elements [global_offset, global_offset + length) of the full tensor are elements [local_offset, ...) of the shard.
struct Run {
  std::int64_t global_offset = 0;
  std::int64_t local_offset = 0;
  std::int64_t length = 0;
  bool operator==(const Run&) const = default;
};

// The part of a full tensor that one rank holds, densely, in the order of its runs. Equally good for parameters, gradients and
// optimizer state of the same shape.
class ShardMap {
 public:
  ShardMap() = default;
  static ShardMap whole(std::int64_t global_elements);
  // Global ranges in local order (their local_offset is not read); neighbours are merged, empty ones left out. UsageError when one
  // leaves [0, global_elements) or two overlap.
  static ShardMap of_ranges(std::int64_t global_elements, const std::vector<Run>& ranges);
  // The index-th of `parts` even parts of this shard, cut between units of `unit` elements (a row, say); the first ones hold one unit
  // more where parts do not divide. This is FSDP's further cut over a data-parallel group.
  ShardMap part(int parts, int index, std::int64_t unit = 1) const;

  std::int64_t global_elements() const { return global_elements_; }
  std::int64_t local_elements() const { return runs_.empty() ? 0 : runs_.back().local_offset + runs_.back().length; }
  std::span<const Run> runs() const { return runs_; }
  // The element of the full tensor that a local one is.
  std::int64_t global_index(std::int64_t local_index) const;
  bool operator==(const ShardMap&) const = default;

 private:
  std::int64_t global_elements_ = 0;
  std::vector<Run> runs_;  // ascending, dense local offsets
};

enum class ExpertTensor : std::uint8_t { w13, w2, w13_bias, w2_bias, w13_scale, w2_scale };
std::string_view name(ExpertTensor tensor);

struct ExpertShape {
  int num_experts = 0;
  std::int64_t hidden_size = 0;
  std::int64_t expert_width = 0;
  std::int64_t scale_block = 128;  // rows and columns that share one scale
};
std::vector<std::int64_t> full_shape(ExpertTensor tensor, const ExpertShape& shape);

// What `rank` of the placement holds: of each of its local experts, ascending, the part of its shard. UsageError, naming tensor and
// sizes, when the number of shards does not divide expert_width, or would cut a scale block.
ShardMap expert_shard(ExpertTensor tensor, const ExpertShape& shape, const Placement& placement, int rank);

// A piece of a shard that travels, or stays, when one set of shards becomes another.
struct Transfer {
  int from_rank = 0;
  std::int64_t from_offset = 0;
  int to_rank = 0;
  std::int64_t to_offset = 0;
  std::int64_t length = 0;
  bool operator==(const Transfer&) const = default;
};
// from[r] is what rank r holds, to[r] what it will hold; ordered by (to_rank, to_offset). What a rank holds already comes from
// itself, the rest from the lowest rank that has it. UsageError when nobody holds an element, or full sizes differ.
std::vector<Transfer> reshard_plan(std::span<const ShardMap> from, std::span<const ShardMap> to);
// Collective: in [from[rank] elements], out [to[rank] elements], of one dtype, dense.
void reshard(Collectives& collectives, std::span<const ShardMap> from, std::span<const ShardMap> to, const ConstTensorView& in,
             const TensorView& out);
// Collective: the full tensor on `root`; out [global elements] there, not looked at elsewhere.
void gather_full(Collectives& collectives, std::span<const ShardMap> maps, const ConstTensorView& in, int root, const TensorView& out);

enum class Distribution : std::uint8_t { uniform, normal };
struct Initialisation {
  Distribution distribution = Distribution::normal;
  float scale = 0.02F;  // normal: the standard deviation (the sum of twelve uniform numbers, so within 6 scale); uniform: the bound
  std::uint64_t seed = 0;
};
// out [local elements] float64, float32, bfloat16 or float16: each element is a function of (seed, name, its global index), rounded
// once, so every layout and every machine starts from the same bits.
void initialise(std::string_view name, const Initialisation& how, const ShardMap& map, const TensorView& out);

enum class ModelFamily : std::uint8_t { qwen3_moe, deepseek_v3, glm4_moe, gpt_oss };
std::string_view name(ModelFamily family);
// Also accepts the model_type of a configuration file and the names of presets.
ModelFamily parse_model_family(std::string_view text);

// Where block b of a full expert tensor is in a checkpoint: element (row, column) is element offset + row * row_stride + column *
// column_stride of tensor `name`. Blocks are (expert, projection) for w13, its bias and its scales, experts for w2's.
struct SourceBlock {
  std::string name;
  std::vector<std::int64_t> shape;  // of that tensor
  std::int64_t offset = 0;
  std::int64_t row_stride = 0;
  std::int64_t column_stride = 0;
};
struct ExpertSource {
  ExpertTensor tensor = ExpertTensor::w13;
  std::int64_t rows = 0;  // of each block
  std::int64_t columns = 0;
  std::vector<SourceBlock> blocks;
};
// UsageError when the family has no such tensor (biases but for gpt-oss, scales but for deepseek_v3).
ExpertSource expert_source(ModelFamily family, int layer, ExpertTensor tensor, const ExpertShape& shape);
// The shared expert, as a tensor of one expert. shape.num_experts is 1.
ExpertSource shared_expert_source(ModelFamily family, int layer, ExpertTensor tensor, const ExpertShape& shape);
// The feed-forward of a layer that has no experts (DenseLayer), likewise. UsageError for gpt_oss, which has none.
ExpertSource dense_layer_source(ModelFamily family, int layer, ExpertTensor tensor, const ExpertShape& shape);

// Names of the tensors that decide the routing; bias is empty where the family has none.
struct GateSource {
  std::string weight;  // [E, H]
  std::string bias;    // [E]: added to the logits (gpt_oss), or bias_corrected's (deepseek_v3, glm4_moe)
};
GateSource gate_source(ModelFamily family, int layer);

// The dtype of a source's tensors. UsageError naming file and tensor when one is missing, or has another shape or type than expected.
Dtype source_dtype(const Checkpoint& checkpoint, const ExpertSource& source);
// Reads the runs of `map`, and nothing else, into out [map.local_elements()] of the source's dtype.
void load_shard(const Checkpoint& checkpoint, const ExpertSource& source, const ShardMap& map, const TensorView& out);
// What a file with these tensors has to plan for, in the order of their blocks.
std::vector<TensorPlan> tensor_plans(const ExpertSource& source, Dtype dtype);
// Writes the full tensor (dense) in the form of the checkpoint, one of its tensors after the other.
void save_full(SafetensorsWriter& writer, const ExpertSource& source, const ConstTensorView& full);

}  // namespace tokenyard
