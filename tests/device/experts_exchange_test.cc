// Rows of a real exchange through the products, by the groups that DeviceRowGroups::of makes of what dispatch left, and back: every
// token gets the weighted sum of its experts' products, in every layout that has such groups.

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "device/layer_side.h"
#include "tokenyard/device_experts.h"
#include "tokenyard/exchange.h"

namespace tokenyard::device_test {
namespace {

constexpr int kExperts = 6, kTopK = 3;
constexpr std::int64_t kHidden = 24, kTokens = 40;

struct Tokens {
  std::int64_t count;
  Values rows;
  std::vector<std::int64_t> ids;
  Values weights;

  // Rank 1 has few tokens; some have fewer than top_k experts, and expert 4 none at all.
  explicit Tokens(int rank)
      : count(rank == 1 ? 3 : kTokens - rank), rows(testing::drawn("rows " + std::to_string(rank), count * kHidden, 1)) {
    for (std::int64_t t = 0; t < count; ++t) {
      const std::int64_t all[] = {(t + rank) % 4, t % 3 == 0 ? -1 : 5, (t + rank + 1) % 4};
      ids.insert(ids.end(), std::begin(all), std::end(all));
    }
    weights = testing::drawn("weights " + std::to_string(rank), count * kTopK, 1);
  }
};

Values weights_of_experts() { return testing::drawn("w", kExperts * kHidden * kHidden, 1); }

Values expected_of(const Tokens& tokens) {
  const Values w = weights_of_experts();
  Values sums(tokens.rows.size());
  for (std::int64_t pair = 0; pair < std::ssize(tokens.ids); ++pair) {
    if (tokens.ids[pair] < 0) continue;
    const double* x = &tokens.rows[pair / kTopK * kHidden];
    for (std::int64_t m = 0; m < kHidden; ++m) {
      const double* row = &w[(tokens.ids[pair] * kHidden + m) * kHidden];
      double sum = 0;
      for (std::int64_t h = 0; h < kHidden; ++h) sum += row[h] * x[h];
      sums[pair / kTopK * kHidden + m] += tokens.weights[pair] * sum;
    }
  }
  return sums;
}

// This rank's experts, [L,H,H].
Tensor local_weights(const Placement& placement, int rank) {
  const Values w = weights_of_experts();
  Values mine;
  const auto local = placement.local_experts(rank);
  for (const int expert : local)
    mine.insert(mine.end(), w.begin() + expert * kHidden * kHidden, w.begin() + (expert + 1) * kHidden * kHidden);
  return Tensor(Dtype::float32, mine, {static_cast<std::int64_t>(local.size()), kHidden, kHidden});
}

using Stream = std::shared_ptr<CUstream_st>;

struct Way {
  Layout layout;
  Mode mode = Mode::throughput;
  Sizing sizing = Sizing::capacity;
};

// Scratch memory and kernels are there before any rank waits for another.
void rehearse(DeviceExperts& experts, OnDevice& device, const TensorView& w, const TensorView& y, std::int64_t most, void* stream) {
  const std::vector<std::int32_t> none(static_cast<std::size_t>(most), -1);
  const TensorView ids = device.copy({none.data(), Dtype::int32, {most, 1}});
  const DeviceRowGroups groups = experts.gather(ids, static_cast<int>(w.shape[0]), stream);
  experts.grouped_gemm(y, groups, w, {}, y, stream);
  experts.unpermute({y, ids, {}}, groups, y, stream);
  cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
}

// On a stream that stays this rank's: an exchange hands a buffer on behind the stream that read it last, whoever uses that by then.
void through(World& world, Exchange& exchange, const Placement& placement, const Way& way, const Stream& stream) {
  const int gpu = exchange.options().device_index;
  const Tokens tokens(world.rank());
  OnDevice device(gpu);
  const TensorView x = device.copy(Tensor(Dtype::float32, tokens.rows, {tokens.count, kHidden}).view());
  const TensorView ids = device.copy({tokens.ids.data(), Dtype::int64, {tokens.count, kTopK}});
  const TensorView weights = device.copy(Tensor(Dtype::float32, tokens.weights, {tokens.count, kTopK}).view());
  const TensorView w = device.copy(local_weights(placement, world.rank()).view());
  const std::int64_t most = std::max<std::int64_t>(world.size() * kTokens * kTopK, placement.max_local_experts() * world.size() * kTokens);
  const TensorView y = device.copy(Tensor::zeros(Dtype::float32, {most, kHidden}).view());
  const TensorView partial = device.copy(Tensor::zeros(Dtype::float32, {most, kHidden}).view());
  const TensorView out = device.copy(Tensor::zeros(Dtype::float32, {tokens.count, kHidden}).view());
  DeviceExperts experts({.device = gpu});
  rehearse(experts, device, w, y, most, stream.get());
  world.barrier();  // nobody allocates any more

  const bool is_token_major = way.layout == Layout::token_major;
  Received received = exchange.dispatch(
      {.rows = x, .topk_ids = ids, .topk_weights = weights},
      {.layout = way.layout, .sizing = way.sizing, .mode = way.mode, .gather_map = is_token_major, .stream = stream.get()});
  const DeviceRowGroups groups = DeviceRowGroups::of(received);
  ASSERT_LE(groups.places, most);
  const TensorView rows = received.rows();
  const TensorView matrix(rows.data, rows.dtype, {rows.num_elements() / kHidden, kHidden});
  const TensorView places(y.data, y.dtype, {groups.places, kHidden});
  experts.grouped_gemm(matrix, groups, w, {}, places, stream.get());
  TensorView sums = rows;
  sums.data = y.data;
  if (is_token_major) {
    sums.data = partial.data;
    experts.unpermute({places, received.local_ids(), received.row_weights()}, groups, sums, stream.get());
  }
  exchange.combine(sums, received.handle(),
                   {.weighting = is_token_major ? Weighting::none : Weighting::at_expert, .out = out, .stream = stream.get()});
  cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  exchange.check();
  const Tensor host = Tensor::zeros(Dtype::float32, {tokens.count, kHidden});
  cuda_check(cudaMemcpy(host.view().data, out.data, tokens.count * kHidden * sizeof(float), cudaMemcpyDeviceToHost), "cudaMemcpy");
  testing::expect_close("sums", host.values(), expected_of(tokens), 1e-5);
  received.release();
  world.barrier();
}

class DeviceExpertsExchange : public OnGpu {};

TEST_F(DeviceExpertsExchange, GroupsOfADispatch) {
  constexpr Way kWays[] = {{Layout::expert_major},
                           {Layout::expert_major, Mode::throughput, Sizing::exact},
                           {Layout::expert_major, Mode::latency},
                           {Layout::expert_padded},
                           {Layout::expert_padded, Mode::latency},
                           {Layout::token_major},
                           {Layout::token_major, Mode::throughput, Sizing::exact}};
  for (const int ranks : {2, 4}) {
    run_ranks(ranks, [&](World& world) {
      const int gpu = use_gpu_of(world.rank());
      const Placement placement = Placement::uniform(kExperts, world.size());
      Exchange exchange(world, {.max_tokens_per_rank = kTokens,
                                .max_row_bytes = kHidden * 4,
                                .top_k = kTopK,
                                .max_local_experts = placement.max_local_experts(),
                                .device = Device::cuda,
                                .device_index = gpu,
                                .sm_budget = sm_budget_of(gpu, world.size()),
                                .timeout_ms = 5'000});
      exchange.add(placement);
      const Stream stream = value_or_throw(borrow_cuda_stream());
      for (const Way& way : kWays) {
        SCOPED_TRACE(fmt::format("{} {} {}, {} ranks", name(way.layout), name(way.mode), name(way.sizing), world.size()));
        through(world, exchange, placement, way, stream);
      }
    });
  }
}

}  // namespace
}  // namespace tokenyard::device_test
