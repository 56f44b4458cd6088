#include "layer/harness.h"

#include <fmt/core.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "experts/row_block.h"
#include "tokenyard/norm.h"

namespace tokenyard::testing {
namespace {

constexpr std::int64_t kMaxTokens = 9;

Values part(const Values& values, std::int64_t first, std::int64_t count, std::int64_t columns) {
  return {values.begin() + first * columns, values.begin() + (first + count) * columns};
}

void append(Values& to, const Values& from) { to.insert(to.end(), from.begin(), from.end()); }
void add(Values& to, const Values& from) {
  for (std::size_t i = 0; i < from.size(); ++i) to[i] += from[i];
}

// Every parameter in one row, so that ranks can be summed in one go.
Values flattened(const Parameters& p) {
  Values all;
  for (const Values* values : {&p.gate, &p.gate_bias, &p.experts.w13, &p.experts.w2, &p.experts.w13_bias, &p.experts.w2_bias, &p.shared.w13,
                               &p.shared.w2, &p.shared_gate}) {
    append(all, *values);
  }
  return all;
}

struct RankResult {
  Values out, d_x;
  Parameters d;
};

// One micro-batch through the layer, forward and backward, added to `result`.
void run_step(MoeLayer& layer, const LayerCase& c, const Batch& batch, const RankWeights& weights, ExpertGroup& group, RankResult& result) {
  const std::int64_t hidden = c.sizes.hidden;
  const MoeStepOptions options = {.mode = c.mode, .sliced_out = c.sliced_out};
  const Tensor x(c.dtype, batch.x, {batch.tokens, hidden});
  std::int64_t first = 0, count = batch.tokens;
  if (c.sliced_out) {
    const std::vector<std::int64_t> counts = slice_counts(batch.tokens, c.tp);
    for (int r = 0; r < group.tp_rank(); ++r) first += counts[r];
    count = counts[group.tp_rank()];
  }
  const Tensor out = Tensor::zeros(c.dtype, {count, hidden});
  MoeActivations saved;
  layer.forward(x.view(), out.view(), options, &saved);
  EXPECT_EQ(x.values(), batch.x) << "the input changed";
  const Tensor unsaved = Tensor::zeros(c.dtype, {count, hidden});
  layer.forward(x.view(), unsaved.view(), options);
  EXPECT_EQ(unsaved.values(), out.values()) << "with and without activations";
  append(result.out, out.values());

  const Tensor d_out(c.dtype, part(batch.d_out, first, count, hidden), {count, hidden});
  const Tensor d_x = Tensor::zeros(c.dtype, {batch.tokens, hidden});
  const RankGradients gradients(weights);
  layer.backward({.x = x.view(), .d_out = d_out.view(), .options = options}, saved, d_x.view(), gradients.views());
  append(result.d_x, d_x.values());
  gradients.add_to(result.d, weights, group);
}

}  // namespace

std::string LayerCase::describe() const {
  return fmt::format("{}, ep {}, tp {} {}, {}, {}, micro-batches {}, dense_tp {}{}{}{}", testing::name(sizes.flavour), ep, tp,
                     tokenyard::name(expert_tp), tokenyard::name(mode), tokenyard::name(dtype), micro_batches, dense_tp,
                     same_tokens ? ", same tokens" : "", sliced_out ? ", sliced" : "", sizes.float8 ? ", float8" : "");
}

Tensor::Tensor(Dtype dtype, const Values& values, std::initializer_list<std::int64_t> shape)
    : bytes_(std::make_shared<std::vector<std::byte>>(values.size() * 4 + 4)), view_(bytes_->data(), dtype, shape) {
  const std::vector<float> floats(values.begin(), values.end());
  experts_internal::from_float(floats.data(), dtype, std::ssize(floats), bytes_->data());
}

Tensor Tensor::zeros(Dtype dtype, std::initializer_list<std::int64_t> shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return Tensor(dtype, Values(static_cast<std::size_t>(count)), shape);
}

Tensor Tensor::of_bytes(Dtype dtype, const std::vector<std::uint8_t>& bytes, std::initializer_list<std::int64_t> shape) {
  Tensor tensor = zeros(Dtype::uint8, {0});
  tensor.bytes_->resize(bytes.size() + 1);
  std::memcpy(tensor.bytes_->data(), bytes.data(), bytes.size());
  tensor.view_ = TensorView(tensor.bytes_->data(), dtype, shape);
  return tensor;
}

Values Tensor::values() const {
  std::vector<float> floats(static_cast<std::size_t>(view_.num_elements()));
  if (!floats.empty()) experts_internal::to_float(bytes_->data(), view_.dtype, std::ssize(floats), floats.data());
  return {floats.begin(), floats.end()};
}

Float8Values::Float8Values(const Values& values, std::int64_t rows, std::int64_t columns) {
  constexpr std::int64_t kBlock = 128;
  const std::int64_t across = (columns + kBlock - 1) / kBlock, down = (rows + kBlock - 1) / kBlock;
  const std::int64_t matrices = std::ssize(values) / (rows * columns);
  const auto block_of = [&](std::int64_t i) {
    return (i / (rows * columns) * down + i / columns % rows / kBlock) * across + i % columns / kBlock;
  };
  scales.assign(static_cast<std::size_t>(matrices * down * across), 0);
  for (std::int64_t i = 0; i < std::ssize(values); ++i) scales[block_of(i)] = std::max(scales[block_of(i)], std::abs(values[i]));
  for (double& scale : scales) scale = std::exp2(std::ceil(std::log2(scale / 448)));
  for (std::int64_t i = 0; i < std::ssize(values); ++i)
    numbers.push_back(float_to_float8_e4m3(static_cast<float>(values[i] / scales[block_of(i)])));
}

namespace {

void set_float8(const FeedForward& mine, RankWeights& w) {
  const std::int64_t n = mine.experts, width = mine.width, hidden = mine.hidden, hidden_blocks = (hidden + 127) / 128;
  const Float8Values w13(mine.w13, width, hidden), w2(mine.w2, hidden, width);
  w.w13 = Tensor::of_bytes(Dtype::float8_e4m3, w13.numbers, {n, 2, width, hidden});
  w.w2 = Tensor::of_bytes(Dtype::float8_e4m3, w2.numbers, {n, hidden, width});
  w.w13_scale = Tensor(Dtype::float32, w13.scales, {n, 2, (width + 127) / 128, hidden_blocks});
  w.w2_scale = Tensor(Dtype::float32, w2.scales, {n, hidden_blocks, (width + 127) / 128});
}

}  // namespace

RankWeights weights_of(const Model& model, const ExpertGroup& group, const LayerCase& c) {
  const Parameters& p = model.parameters();
  RankWeights w;
  const std::int64_t hidden = c.sizes.hidden;
  const bool is_replicated = c.placement.has_value() && c.expert_tp == ExpertTp::virtual_experts;
  w.shards = is_replicated ? 1 : c.tp;
  w.shard = group.world().rank() % w.shards;
  const Placement placement = c.placement.value_or(Placement::uniform(c.sizes.experts, c.ep));
  const auto local = placement.local_experts(is_replicated ? group.world().rank() : group.ep_rank());
  w.experts.assign(local.begin(), local.end());
  const FeedForward mine = cut(p.experts, w.experts, w.shards, w.shard);
  w.gate = Tensor(c.dtype, p.gate, {c.sizes.experts, hidden});
  if (!p.gate_bias.empty()) w.gate_bias = Tensor(Dtype::float32, p.gate_bias, {c.sizes.experts});
  if (!p.selection_bias.empty()) w.selection_bias = Tensor(Dtype::float32, p.selection_bias, {c.sizes.experts});
  if (c.sizes.float8) {
    set_float8(mine, w);
  } else {
    w.w13 = Tensor(c.dtype, mine.w13, {mine.experts, 2, mine.width, hidden});
    w.w2 = Tensor(c.dtype, mine.w2, {mine.experts, hidden, mine.width});
  }
  if (!p.experts.w13_bias.empty()) w.w13_bias = Tensor(c.dtype, mine.w13_bias, {mine.experts, 2, mine.width});
  if (!p.experts.w2_bias.empty() && w.shard == 0) w.w2_bias = Tensor(c.dtype, mine.w2_bias, {mine.experts, hidden});
  if (p.shared.experts == 0) return w;
  const FeedForward shared = cut(p.shared, {0}, c.dense_tp, group.dense_rank());
  w.shared_w13 = Tensor(c.dtype, shared.w13, {1, 2, shared.width, hidden});
  w.shared_w2 = Tensor(c.dtype, shared.w2, {1, hidden, shared.width});
  if (!p.shared_gate.empty()) w.shared_gate = Tensor(c.dtype, p.shared_gate, {1, hidden});
  return w;
}

MoeWeights RankWeights::views() const {
  return {.gate = {gate.view(), gate_bias.view(), selection_bias.view()},
          .experts = {w13.view(), w2.view(), w13_bias.view(), w2_bias.view(), w13_scale.view(), w2_scale.view()},
          .shared = {{shared_w13.view(), shared_w2.view(), {}, {}}, shared_gate.view()}};
}

RankGradients::RankGradients(const RankWeights& weights) {
  const auto like = [](const Tensor& tensor) {
    if (!tensor.view()) return Tensor();
    TensorView view = tensor.view();
    const auto& s = view.shape;
    switch (view.ndim) {
      case 1:
        return Tensor::zeros(Dtype::float32, {s[0]});
      case 2:
        return Tensor::zeros(Dtype::float32, {s[0], s[1]});
      case 3:
        return Tensor::zeros(Dtype::float32, {s[0], s[1], s[2]});
      default:
        return Tensor::zeros(Dtype::float32, {s[0], s[1], s[2], s[3]});
    }
  };
  gate = like(weights.gate), gate_bias = like(weights.gate_bias);
  w13 = like(weights.w13), w2 = like(weights.w2), w13_bias = like(weights.w13_bias), w2_bias = like(weights.w2_bias);
  shared_w13 = like(weights.shared_w13), shared_w2 = like(weights.shared_w2), shared_gate = like(weights.shared_gate);
}

MoeGradients RankGradients::views() const {
  return {.gate_weight = gate.view(),
          .gate_bias = gate_bias.view(),
          .experts = {w13.view(), w2.view(), w13_bias.view(), w2_bias.view()},
          .shared = {{shared_w13.view(), shared_w2.view(), {}, {}}, shared_gate.view()}};
}

void RankGradients::add_to(Parameters& full, const RankWeights& weights, const ExpertGroup& group) const {
  add(full.gate, gate.values());
  add(full.gate_bias, gate_bias.values());
  const std::int64_t width = full.experts.width / weights.shards;
  paste(full.experts,
        {std::ssize(weights.experts), width, full.experts.hidden, w13.values(), w2.values(), w13_bias.values(), w2_bias.values()},
        weights.experts, weights.shards, weights.shard);
  if (full.shared.experts == 0) return;
  const int shards = group.options().dense_tp;
  paste(full.shared, {1, full.shared.width / shards, full.shared.hidden, shared_w13.values(), shared_w2.values(), {}, {}}, {0}, shards,
        group.dense_rank());
  add(full.shared_gate, shared_gate.values());
}

Batch batch_of(const LayerCase& c, int rank) {
  if (c.same_tokens) rank = 0;
  Batch batch{rank == 1 ? 0 : kMaxTokens - 2 * (rank % 4), {}, {}};
  const std::string of = " of rank " + std::to_string(rank);
  batch.x = Tensor(c.dtype, drawn("x" + of, batch.tokens * c.sizes.hidden, 1), {batch.tokens, c.sizes.hidden}).values();
  batch.d_out = Tensor(c.dtype, drawn("d_out" + of, batch.tokens * c.sizes.hidden, 1), {batch.tokens, c.sizes.hidden}).values();
  return batch;
}

Values outputs_of(const Model& model, const Batch& batch, std::int64_t hidden) {
  Values all;
  for (std::int64_t t = 0; t < batch.tokens; ++t) {
    const Values row = model.forward(&batch.x[t * hidden]);
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

Replay replay_of(const Model& model, const Batch& batch, std::int64_t hidden) {
  Replay replay;
  for (std::int64_t t = 0; t < batch.tokens; ++t) {
    const std::vector<int> chosen = {static_cast<int>(t % 6), static_cast<int>((t + 2) % 6), static_cast<int>((t + 3) % 6)};
    replay.ids.insert(replay.ids.end(), chosen.begin(), chosen.end());
    replay.mask.push_back(t % 2);
    const Values row = t % 2 == 0 ? Values(hidden) : model.forward(&batch.x[t * hidden], &chosen);
    replay.outputs.insert(replay.outputs.end(), row.begin(), row.end());
  }
  return replay;
}

ParallelConfig config_of(const LayerCase& c) {
  return solve_parallel({.device_count = c.ep * c.tp * c.outer_dp, .ep = c.ep, .outer_dp = c.outer_dp, .mlp_tp = c.tp});
}

ExpertGroupOptions group_options(const LayerCase& c) {
  return {.num_experts = c.sizes.experts,
          .top_k = c.sizes.top_k,
          .hidden_size = c.sizes.hidden,
          .dtype = c.dtype,
          .max_tokens_per_rank = kMaxTokens,
          .expert_tp = c.expert_tp,
          .same_tokens = c.same_tokens,
          .dense_tp = c.dense_tp,
          .max_local_experts = c.placement ? c.placement->max_local_experts() : 0,
          .timeout_ms = 60'000};
}

Gate gate_of(const ModelSizes& sizes) {
  switch (sizes.flavour) {
    case Flavour::deepseek:
      return Gate::bias_corrected(sizes.top_k, Score::sigmoid, sizes.groups, 2, true, 2.5F);
    case Flavour::qwen2:
      return Gate::softmax(sizes.top_k, false);
    case Flavour::intern:
      return Gate::per_group(sizes.top_k, sizes.groups, Score::softmax, true);
    default:
      return Gate::softmax(sizes.top_k, true);
  }
}

MoeLayerOptions layer_options(const LayerCase& c) {
  const bool is_gpt = c.sizes.flavour == Flavour::gpt_oss;
  return {
      .gate = gate_of(c.sizes), .activation = {.kind = is_gpt ? ActivationKind::clamped : ActivationKind::silu}, .placement = c.placement};
}

Values sum_over_ranks(const World& world, const Values& mine) {
  const auto all = world.all_gather(std::as_bytes(std::span(mine)));
  Values sum(mine.size());
  for (const std::vector<std::byte>& of_rank : all) {
    Values values(of_rank.size() / sizeof(double));
    if (values.size() != sum.size()) throw std::logic_error("ranks have different parameters");
    if (!values.empty()) std::memcpy(values.data(), of_rank.data(), of_rank.size());
    add(sum, values);
  }
  return sum;
}

void expect_close(const char* what, const Values& values, const Values& expected, double tolerance) {
  ASSERT_EQ(values.size(), expected.size()) << what;
  double largest = 0;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(values[i], expected[i], tolerance * (largest + 1e-3)) << what << " " << i;
}

void expect_single_process_answer(World& world, const LayerCase& c) {
  const Model model(c.sizes);
  auto group = std::make_shared<ExpertGroup>(world, config_of(c), group_options(c));
  const RankWeights weights = weights_of(model, *group, c);
  MoeLayer layer(group, weights.views(), layer_options(c));
  const std::int64_t hidden = c.sizes.hidden;
  const Batch batch = batch_of(c, group->world().rank());
  RankResult result = {{}, {}, model.zeros()};
  for (int m = 0; m < c.micro_batches; ++m) {
    const std::int64_t first = batch.tokens * m / c.micro_batches;
    const std::int64_t count = batch.tokens * (m + 1) / c.micro_batches - first;
    run_step(layer, c, {count, part(batch.x, first, count, hidden), part(batch.d_out, first, count, hidden)}, weights, *group, result);
  }

  Values out, d_x(batch.x.size());
  Parameters d = model.zeros();
  for (int rank = 0; rank < (c.same_tokens ? 1 : group->world().size()); ++rank) {
    const Batch of_rank = batch_of(c, rank);
    const bool is_mine = c.same_tokens || rank == group->world().rank();
    Values d_rows(of_rank.x.size());
    for (std::int64_t t = 0; t < of_rank.tokens; ++t) {
      model.backward(&of_rank.x[t * hidden], &of_rank.d_out[t * hidden], &d_rows[t * hidden], d);
      if (is_mine) append(out, model.forward(&of_rank.x[t * hidden]));
    }
    if (is_mine) d_x = d_rows;
  }
  if (c.sliced_out) {  // with one micro-batch
    const std::vector<std::int64_t> counts = slice_counts(batch.tokens, c.tp);
    std::int64_t first = 0;
    for (int r = 0; r < group->tp_rank(); ++r) first += counts[r];
    out = part(out, first, counts[group->tp_rank()], hidden);
  }
  expect_close("out", result.out, out, c.tolerance);
  expect_close("d_x", result.d_x, d_x, c.tolerance);
  expect_close("parameters", sum_over_ranks(group->world(), flattened(result.d)), flattened(d), c.tolerance);
}

void run_case(const LayerCase& c) {
  SCOPED_TRACE(c.describe());
  run_ranks(c.ep * c.tp * c.outer_dp, [&](World& world) { expect_single_process_answer(world, c); });
}

}  // namespace tokenyard::testing
