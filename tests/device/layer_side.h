#pragma once
// A layer of tests/layer on GPUs: the same weights and batches in device memory, and the same model in one process to agree with.

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <numeric>

#include "device/gpus.h"
#include "layer/harness.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "tokenyard/norm.h"

namespace tokenyard::device_test {

using testing::Batch;
using testing::batch_of;
using testing::LayerCase;
using testing::Model;
using testing::ModelSizes;
using testing::RankWeights;
using testing::Tensor;
using testing::Values;

// Tensors in device memory, as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int gpu) : gpu_(gpu) {}
  TensorView copy(const ConstTensorView& host) {
    if (!host) return {};
    const auto bytes = static_cast<std::size_t>(host.num_elements() * size_of(host.dtype));
    memory_.push_back(value_or_throw(make_device_buffer(gpu_, bytes)));
    TensorView view;
    view.dtype = host.dtype;
    view.ndim = host.ndim;
    view.shape = host.shape;
    view.strides = host.strides;
    view.data = memory_.back().data();
    write(view, host);
    return view;
  }
  MoeWeights copy(const MoeWeights& host) {
    const auto feed_forward = [this](const ExpertWeights& of) {
      return ExpertWeights{copy(of.w13), copy(of.w2), copy(of.w13_bias), copy(of.w2_bias), copy(of.w13_scale), copy(of.w2_scale)};
    };
    return {.gate = {copy(host.gate.weight), copy(host.gate.logit_bias), copy(host.gate.selection_bias)},
            .experts = feed_forward(host.experts),
            .shared = {feed_forward(host.shared.weights), copy(host.shared.gate)}};
  }
  static void read(const TensorView& host, const ConstTensorView& view) {
    if (!view) return;
    const auto bytes = static_cast<std::size_t>(view.num_elements() * size_of(view.dtype));
    cuda_check(cudaMemcpy(host.data, view.data, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  }
  static void write(const TensorView& view, const ConstTensorView& host) {
    const auto bytes = static_cast<std::size_t>(host.num_elements() * size_of(host.dtype));
    cuda_check(cudaMemcpy(view.data, host.data, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
  }

 private:
  int gpu_;
  std::deque<DeviceBuffer> memory_;
};

// Of each rank: the exchange, shards of experts that meet beside it, ranks that share a dense layer.
inline int waiting_kernels(const LayerCase& c) {
  const bool gathers = c.tp > 1 && (c.ep == 1 || c.expert_tp == ExpertTp::gathered);
  return std::max(1, (c.ep > 1 ? 1 : 0) + (gathers ? 1 : 0) + (c.dense_tp > 1 ? 1 : 0));
}

inline ExpertGroupOptions gpu_options(const LayerCase& c, int gpu, int ranks) {
  ExpertGroupOptions options = testing::group_options(c);
  options.device = Device::cuda;
  options.device_index = gpu;
  options.sm_budget = sm_budget_of(gpu, ranks * waiting_kernels(c));
  return options;
}

// One rank of a case: its layer and its tokens.
class LayerRank {
 public:
  LayerRank(World& world, const LayerCase& of, const std::function<void(ExpertGroupOptions&)>& change = {})
      : c(of),
        gpu(use_gpu_of(world.rank())),
        model(of.sizes),
        group(std::make_shared<ExpertGroup>(world, testing::config_of(of), changed(gpu_options(of, gpu, world.size()), change))),
        device(gpu),
        weights(testing::weights_of(model, *group, of)),
        layer(group, device.copy(weights.views()), testing::layer_options(of)),
        stream(value_or_throw(borrow_cuda_stream())),
        batch(batch_of(of, group->world().rank())),
        own(own_rows()) {
    x = device.copy(Tensor(c.dtype, batch.x, {batch.tokens, c.sizes.hidden}).view());
    out = device.copy(Tensor::zeros(c.dtype, {own.count, c.sizes.hidden}).view());
    world.barrier();  // nobody allocates any more
  }

  // Other rows, the same number of them.
  void draw(int seed) {
    const std::string what = "x " + std::to_string(seed) + " of " + std::to_string(c.same_tokens ? 0 : group->world().rank());
    const Tensor rows(c.dtype, testing::drawn(what, batch.tokens * c.sizes.hidden, 1), {batch.tokens, c.sizes.hidden});
    batch.x = rows.values();
    OnDevice::write(x, rows.view());
  }
  MoeStepOptions options(Mode mode) const { return {.mode = mode, .sliced_out = c.sliced_out, .stream = stream.get()}; }
  // Waits for the stream.
  Values fetch(const TensorView& view) const {
    cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    const Tensor host = Tensor::zeros(view.dtype, {view.shape[0], view.shape[1]});
    const auto bytes = static_cast<std::size_t>(view.num_elements() * size_of(view.dtype));
    cuda_check(cudaMemcpy(host.view().data, view.data, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host.values();
  }
  Values expected() const { return own_part(testing::outputs_of(model, batch, c.sizes.hidden)); }
  // With sliced_out, of rows that all ranks have.
  Values own_part(const Values& rows) const {
    const auto first = rows.begin() + own.begin * c.sizes.hidden;
    return {first, first + own.count * c.sizes.hidden};
  }
  void expect_answer(const char* what) const { testing::expect_close(what, fetch(out), expected(), c.tolerance); }

  LayerCase c;
  int gpu;
  Model model;
  std::shared_ptr<ExpertGroup> group;
  OnDevice device;
  RankWeights weights;
  MoeLayer layer;
  std::shared_ptr<CUstream_st> stream;
  Batch batch;
  struct {
    std::int64_t begin = 0, count = 0;
  } own;  // rows of out, among those of x
  TensorView x, out;

 private:
  decltype(own) own_rows() const {
    if (!c.sliced_out) return {0, batch.tokens};
    const std::vector<std::int64_t> counts = slice_counts(batch.tokens, c.tp);
    return {std::accumulate(counts.begin(), counts.begin() + group->tp_rank(), std::int64_t{0}), counts[group->tp_rank()]};
  }
  static ExpertGroupOptions changed(ExpertGroupOptions options, const std::function<void(ExpertGroupOptions&)>& change) {
    if (change) change(options);
    return options;
  }
};

// On ranks of this process; memory goes back when all streams are done.
inline void on_layer_ranks(const LayerCase& c, const std::function<void(LayerRank&)>& fn,
                           const std::function<void(ExpertGroupOptions&)>& change = {}) {
  SCOPED_TRACE(c.describe());
  run_ranks(c.ep * c.tp * c.outer_dp, [&](World& world) {
    LayerRank rank(world, c, change);
    fn(rank);
    cuda_check(cudaStreamSynchronize(rank.stream.get()), "cudaStreamSynchronize");
    world.barrier();
  });
}

}  // namespace tokenyard::device_test
