#include <algorithm>

#include "core/name_table.h"
#include "weights/block_shape.h"

namespace tokenyard {
namespace {

using weights_internal::BlockShape;
using weights_internal::Cut;

constexpr NamedValue<ExpertTensor> kExpertTensors[] = {{ExpertTensor::w13, "w13"},
                                                       {ExpertTensor::w2, "w2"},
                                                       {ExpertTensor::w13_bias, "w13_bias"},
                                                       {ExpertTensor::w2_bias, "w2_bias"},
                                                       {ExpertTensor::w13_scale, "w13_scale"},
                                                       {ExpertTensor::w2_scale, "w2_scale"}};

// An expert's shard on a rank.
struct Piece {
  int shard = 0;
  int of = 1;
};

Piece piece_on(const Placement& placement, int expert, int rank) {
  for (const Replica& replica : placement.replicas(expert)) {
    const auto found = std::find(replica.shard_ranks.begin(), replica.shard_ranks.end(), rank);
    if (found != replica.shard_ranks.end()) {
      return {static_cast<int>(found - replica.shard_ranks.begin()), static_cast<int>(replica.shard_ranks.size())};
    }
  }
  TY_ASSERT(false && "a local expert has an instance on its rank");
  return {};
}

void check_cut(ExpertTensor tensor, const ExpertShape& shape, int shards) {
  if (shards == 1) return;
  const std::int64_t width = shape.expert_width;
  if (width % shards != 0) {
    usage_error("{}: expert_width = {} is no multiple of {} shards; use a tensor parallelism that divides it", name(tensor), width, shards);
  }
  const bool has_scales = tensor == ExpertTensor::w13_scale || tensor == ExpertTensor::w2_scale;
  if (has_scales && width / shards % shape.scale_block != 0) {
    usage_error(
        "{}: {} shards of expert_width {} have {} rows, which is no multiple of the {} that share a scale: a block would be in two shards; "
        "use fewer shards, or dequantise first",
        name(tensor), shards, width, width / shards, shape.scale_block);
  }
}

// Of one block that begins at `base`.
void append_block(std::vector<Run>& ranges, const BlockShape& block, std::int64_t base, const Piece& piece) {
  switch (block.cut) {
    case Cut::rows: {
      const std::int64_t run = block.rows / piece.of * block.columns;
      ranges.push_back({base + piece.shard * run, 0, run});
      return;
    }
    case Cut::columns: {
      const std::int64_t run = block.columns / piece.of;
      for (std::int64_t row = 0; row < block.rows; ++row) ranges.push_back({base + row * block.columns + piece.shard * run, 0, run});
      return;
    }
    case Cut::held_by_first:
      if (piece.shard == 0) ranges.push_back({base, 0, block.rows * block.columns});
      return;
  }
}

}  // namespace

std::string_view name(ExpertTensor tensor) { return name_in(kExpertTensors, tensor); }

weights_internal::BlockShape weights_internal::block_shape(ExpertTensor tensor, const ExpertShape& shape) {
  const auto& [experts, hidden, width, scale_block] = shape;
  constexpr std::int64_t kMost = std::int64_t{1} << 30;  // rows, columns; with 2^16 experts the product still has to be looked at
  if (experts < 1 || hidden < 1 || width < 1 || scale_block < 1 || hidden > kMost || width > kMost) {
    usage_error("{}: num_experts = {}, hidden_size = {}, expert_width = {}, scale_block = {}; all are in 1..{}", name(tensor), experts,
                hidden, width, scale_block, kMost);
  }
  if (static_cast<double>(experts) * 2 * static_cast<double>(hidden) * static_cast<double>(width) > 9.2e18) {
    usage_error("{}: {} experts x 2 x {} x {} elements overflow 64 bits", name(tensor), experts, width, hidden);
  }
  const auto blocks = [block = scale_block](std::int64_t size) { return (size + block - 1) / block; };
  switch (tensor) {
    case ExpertTensor::w13:
      return {2, width, hidden, Cut::rows};
    case ExpertTensor::w2:
      return {1, hidden, width, Cut::columns};
    case ExpertTensor::w13_bias:
      return {2, width, 1, Cut::rows};
    case ExpertTensor::w2_bias:
      return {1, hidden, 1, Cut::held_by_first};
    case ExpertTensor::w13_scale:
      return {2, blocks(width), blocks(hidden), Cut::rows};
    case ExpertTensor::w2_scale:
      return {1, blocks(hidden), blocks(width), Cut::columns};
  }
  usage_error("expert tensor {}; use one of the named ones", static_cast<int>(tensor));
}

std::vector<std::int64_t> full_shape(ExpertTensor tensor, const ExpertShape& shape) {
  const BlockShape block = weights_internal::block_shape(tensor, shape);
  std::vector<std::int64_t> sizes = {shape.num_experts};
  if (block.blocks_per_expert > 1) sizes.push_back(block.blocks_per_expert);
  sizes.push_back(block.rows);
  if (tensor != ExpertTensor::w13_bias && tensor != ExpertTensor::w2_bias) sizes.push_back(block.columns);
  return sizes;
}

ShardMap expert_shard(ExpertTensor tensor, const ExpertShape& shape, const Placement& placement, int rank) {
  const BlockShape block = weights_internal::block_shape(tensor, shape);
  if (placement.num_experts() != shape.num_experts) {
    usage_error("{}: the placement has {} experts, the tensor {}; use the placement of this model", name(tensor), placement.num_experts(),
                shape.num_experts);
  }
  const std::int64_t elements = block.rows * block.columns;
  std::vector<Run> ranges;
  for (const int expert : placement.local_experts(rank)) {
    const Piece piece = piece_on(placement, expert, rank);
    check_cut(tensor, shape, piece.of);
    for (int b = 0; b < block.blocks_per_expert; ++b) {
      append_block(ranges, block, (std::int64_t{expert} * block.blocks_per_expert + b) * elements, piece);
    }
  }
  return ShardMap::of_ranges(std::int64_t{shape.num_experts} * block.blocks_per_expert * elements, ranges);
}

}  // namespace tokenyard
