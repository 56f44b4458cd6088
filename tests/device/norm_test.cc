// Residual + RMSNorm on GPUs beside that of CPUs: what is kept bit for bit, the rest within rounding; with the collectives, from a graph,
// and when a rank refuses.

#include <gtest/gtest.h>

#include "device/layer_side.h"
#include "memory/cuda_graph.h"
#include "tokenyard/norm.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::device_test {
namespace {

using testing::drawn;
using testing::expect_close;
using testing::expect_usage_error;

constexpr float kEpsilon = 1e-3F;

class DeviceNorm : public OnGpu {};

double tolerance_of(Dtype dtype) { return dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float16 ? 2e-3 : 1e-2; }

// A matrix on both sides, whose rows lie `gap` elements apart from each other.
struct Both {
  Tensor host;
  TensorView here, there;
  Both(OnDevice& device, Dtype dtype, const char* what, std::int64_t rows, std::int64_t columns, std::int64_t gap)
      : host(dtype, drawn(what, rows * (columns + gap), 1), {rows, columns + gap}), here(host.view()), there(device.copy(here)) {
    here.shape[1] = there.shape[1] = columns;
  }
  // What the GPU has, gaps included: nothing may be written there.
  Values fetched() const {
    const Tensor copy = Tensor::zeros(host.view().dtype, {host.view().shape[0], host.view().shape[1]});
    cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    OnDevice::read(copy.view(), whole());
    return copy.values();
  }

 private:
  TensorView whole() const {
    TensorView view = host.view();
    view.data = there.data;
    return view;
  }
};

struct Shape {
  std::int64_t rows, columns, gap;
};
constexpr Shape kShapes[] = {{1, 3, 0}, {5, 17, 3}, {4, 96, 0}, {70, 2056, 8}};

void expect_forward(Dtype dtype, Dtype weights, const Shape& shape, bool is_whole) {
  OnDevice device(use_gpu_of(0));
  const auto matrix = [&](const char* what) { return Both(device, dtype, what, shape.rows, shape.columns, shape.gap); };
  const Both x = matrix("x"), residual = matrix("residual"), out = matrix("out"), kept = matrix("kept");
  const Tensor weight(weights, drawn("weight", shape.columns, 1), {shape.columns}),
      bias(dtype, drawn("b", shape.columns, 1), {shape.columns});
  const Tensor inverse = Tensor::zeros(Dtype::float32, {shape.rows});
  const TensorView w = device.copy(weight.view()), b = device.copy(bias.view()), i = device.copy(inverse.view());
  if (is_whole) {  // the residual in place
    residual_norm({x.here, residual.here, bias.view()}, {weight.view(), kEpsilon}, {residual.here, out.here, inverse.view()});
    residual_norm({x.there, residual.there, b}, {w, kEpsilon}, {residual.there, out.there, i}, nullptr);
    EXPECT_EQ(residual.fetched(), residual.host.values());
    const Tensor found = Tensor::zeros(Dtype::float32, {shape.rows});
    OnDevice::read(found.view(), i);
    expect_close("inverse", found.values(), inverse.values(), 1e-5);
  } else {  // out over x
    residual_norm({x.here, {}, {}}, {weight.view(), kEpsilon}, {kept.here, x.here});
    residual_norm({x.there, {}, {}}, {w, kEpsilon}, {kept.there, x.there}, nullptr);
    EXPECT_EQ(kept.fetched(), kept.host.values());
    expect_close("out over x", x.fetched(), x.host.values(), tolerance_of(dtype));
    return;
  }
  expect_close("out", out.fetched(), out.host.values(), tolerance_of(dtype));
}

void expect_backward(Dtype dtype, Dtype weights, const Shape& shape, bool is_whole) {
  OnDevice device(use_gpu_of(0));
  const auto matrix = [&](const char* what) { return Both(device, dtype, what, shape.rows, shape.columns, shape.gap); };
  const Both kept = matrix("kept"), d_out = matrix("d_out"), d_residual = matrix("d_residual"), out = matrix("out"),
             again = matrix("again");
  const Tensor weight(weights, drawn("weight", shape.columns, 1), {shape.columns});
  const Tensor inverse = Tensor::zeros(Dtype::float32, {shape.rows}),
               d_weight(Dtype::float32, drawn("d", shape.columns, 1), {shape.columns});
  const TensorView w = device.copy(weight.view()), i = device.copy(inverse.view()), d = device.copy(d_weight.view());
  const RmsNorm here = {weight.view(), kEpsilon}, there = {w, kEpsilon};
  residual_norm({kept.here, {}, {}}, here, {again.here, out.here, inverse.view()});
  residual_norm({kept.there, {}, {}}, there, {again.there, out.there, i}, nullptr);
  const ConstTensorView none;
  if (is_whole) {  // the gradient of the residual in place
    residual_norm_backward({kept.here, d_residual.here, d_out.here, inverse.view()}, here, d_residual.here, d_weight.view());
    residual_norm_backward({kept.there, d_residual.there, d_out.there, i}, there, d_residual.there, d, nullptr);
    expect_close("d_x", d_residual.fetched(), d_residual.host.values(), tolerance_of(dtype));
  } else {  // over d_out, which the gradient of the weight is made of, too
    residual_norm_backward({kept.here, none, d_out.here, inverse.view()}, here, d_out.here, d_weight.view());
    residual_norm_backward({kept.there, none, d_out.there, i}, there, d_out.there, d, nullptr);
    expect_close("d_x over d_out", d_out.fetched(), d_out.host.values(), tolerance_of(dtype));
  }
  const Tensor found = Tensor::zeros(Dtype::float32, {shape.columns});
  OnDevice::read(found.view(), d);
  expect_close("d_weight", found.values(), d_weight.values(), 1e-5);
}

TEST_F(DeviceNorm, OfEveryTypeAndShape) {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    for (const Dtype weights : {Dtype::float32, dtype}) {
      for (const Shape& shape : kShapes) {
        for (const bool is_whole : {true, false}) {
          SCOPED_TRACE(::testing::Message() << name(dtype) << " " << shape.rows << " x " << shape.columns << (is_whole ? ", whole" : ""));
          expect_forward(dtype, weights, shape, is_whole);
          expect_backward(dtype, weights, shape, is_whole);
        }
      }
    }
  }
}

// One rank's side of both fused steps; `counts` of its slices.
struct Fused {
  static constexpr std::int64_t kHidden = 24;
  Fused(World& world, std::int64_t of_tokens)
      : tokens(of_tokens),
        count(slice_counts(of_tokens, world.size())[world.rank()]),
        gpu(use_gpu_of(world.rank())),
        device(gpu),
        stream(value_or_throw(borrow_cuda_stream())),
        collectives(DeviceCollectives::create(
            world, {.device_index = gpu, .transport = Transport::cuda_peer, .sm_budget = sm_budget_of(gpu, world.size())})),
        cpu(Collectives::create(world)),
        rank(std::to_string(world.rank())) {
    weight = Tensor(Dtype::float32, drawn("weight", kHidden, 1), {kHidden});
    w = device.copy(weight.view());
  }
  // The same tensor on both sides.
  std::pair<Tensor, TensorView> both(const std::string& what, std::int64_t rows) {
    Tensor host(Dtype::bfloat16, drawn(what + rank, rows * kHidden, 1), {rows, kHidden});
    const TensorView there = device.copy(host.view());
    return {std::move(host), there};
  }
  void expect_same(const char* what, const std::pair<Tensor, TensorView>& tensor) const {
    cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
    const Tensor found = Tensor::zeros(Dtype::bfloat16, {tensor.second.shape[0], kHidden});
    OnDevice::read(found.view(), tensor.second);
    expect_close(what, found.values(), tensor.first.values(), 1e-2);
  }

  std::int64_t tokens, count;
  int gpu;
  OnDevice device;
  std::shared_ptr<CUstream_st> stream;
  std::unique_ptr<DeviceCollectives> collectives;
  std::unique_ptr<Collectives> cpu;
  std::string rank;
  Tensor weight;
  TensorView w;
};

void expect_fused(World& world, std::int64_t tokens) {
  Fused f(world, tokens);
  const auto x = f.both("x", tokens), residual = f.both("residual", f.count), out = f.both("out", f.count);
  const auto all = f.both("all", tokens), kept = f.both("kept", f.count), d_all = f.both("d all", tokens), d_x = f.both("d x", f.count);
  const auto d_partial = f.both("d partial", tokens), d_residual = f.both("d residual", f.count);
  world.barrier();  // nobody allocates any more
  const RmsNorm here = {f.weight.view(), kEpsilon}, there = {f.w, kEpsilon};
  void* const stream = f.stream.get();
  reduce_scatter_norm(*f.cpu, {x.first.view(), residual.first.view(), {}}, here, {residual.first.view(), out.first.view()});
  norm_all_gather(*f.cpu, {out.first.view(), {}, {}}, here, {kept.first.view(), all.first.view()});
  norm_all_gather_backward(*f.cpu, {kept.first.view(), {}, d_all.first.view()}, here, d_x.first.view(), {});
  reduce_scatter_norm_backward(*f.cpu, {residual.first.view(), {}, d_x.first.view()}, here,
                               {d_residual.first.view(), d_partial.first.view()}, {});
  const CudaGraph graph(f.stream.get(), [&] {
    reduce_scatter_norm(*f.collectives, {x.second, residual.second, {}}, there, {residual.second, out.second}, stream);
    norm_all_gather(*f.collectives, {out.second, {}, {}}, there, {kept.second, all.second}, stream);
    norm_all_gather_backward(*f.collectives, {kept.second, {}, d_all.second}, there, d_x.second, {}, stream);
    reduce_scatter_norm_backward(*f.collectives, {residual.second, {}, d_x.second}, there, {d_residual.second, d_partial.second}, {},
                                 stream);
  });
  world.barrier();
  graph.launch();
  f.expect_same("residual", residual), f.expect_same("out", out), f.expect_same("all", all), f.expect_same("d_x", d_x);
  f.expect_same("d_partial", d_partial), f.expect_same("d_residual", d_residual);
  f.collectives->check();
  world.barrier();
}

TEST_F(DeviceNorm, WithItsCollectivesFromAGraph) {
  for (const int ranks : {1, 2, 4}) {
    for (const std::int64_t tokens : {0, 1, 3, 10}) {
      SCOPED_TRACE(std::to_string(ranks) + " ranks, " + std::to_string(tokens) + " tokens");
      run_ranks(ranks, [&](World& world) { expect_fused(world, tokens); });
    }
  }
}

// Rank 0 refuses: the other learns why, and the next call is fine.
TEST_F(DeviceNorm, ARefusedCallIsToldToPeers) {
  run_ranks(2, [](World& world) {
    Fused f(world, 2);
    const auto x = f.both("x", 1), kept = f.both("kept", 1), all = f.both("all", 2);
    world.barrier();
    void* const stream = f.stream.get();
    const RmsNorm norm = {f.w, kEpsilon};
    if (world.rank() == 0) {
      expect_usage_error(
          [&] {
            norm_all_gather(*f.collectives, {x.first.view(), {}, {}}, norm, {kept.second, all.second}, stream);
          },
          {"x is", "ordinary host memory"});
    } else {
      norm_all_gather(*f.collectives, {x.second, {}, {}}, norm, {kept.second, all.second}, stream);
      cuda_check(cudaStreamSynchronize(f.stream.get()), "cudaStreamSynchronize");
      try {
        f.collectives->check();
        ADD_FAILURE() << "rank 1 was told nothing";
      } catch (const TransportError& error) {
        EXPECT_EQ(error.failure().kind, FailureKind::aborted);
        EXPECT_NE(error.failure().detail.find("ordinary host memory"), std::string::npos) << error.what();
      }
    }
    world.barrier();
    norm_all_gather(*f.collectives, {x.second, {}, {}}, norm, {kept.second, all.second}, stream);
    norm_all_gather(*f.cpu, {x.first.view(), {}, {}}, {f.weight.view(), kEpsilon}, {kept.first.view(), all.first.view()});
    f.expect_same("all", all);
    world.barrier();
  });
}

TEST_F(DeviceNorm, SaysWhatItNeeds) {
  OnDevice device(use_gpu_of(0));
  const TensorView x = device.copy(Tensor(Dtype::float32, drawn("x", 8, 1), {1, 8}).view());
  const TensorView w = device.copy(Tensor(Dtype::float32, drawn("w", 8, 1), {8}).view());
  expect_usage_error([&] { residual_norm_backward({x, {}, x}, {w}, x, w, nullptr); }, {"d_weight without inverse"});
  const Tensor host = Tensor::zeros(Dtype::float32, {8});
  expect_usage_error([&] { residual_norm({x, {}, {}}, {host.view()}, {x, x}, nullptr); }, {"norm.weight", "ordinary host memory"});
}

}  // namespace
}  // namespace tokenyard::device_test
