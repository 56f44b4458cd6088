// Collectives over NCCL, and the exchange over them that benchmarks compare with. Rank r has GPU r: NCCL takes one rank per GPU.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "device/gpus.h"
#include "exchange/cuda_collective.h"
#include "exchange/to_host.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "multirank/collective_check.h"
#include "multirank/exchange_processes.h"
#include "multirank/world_failures.h"

namespace tokenyard::device_test {
namespace {

using exchange_internal::CudaCollectiveExchange;
using exchange_test::RegisterBody;
using exchange_test::run_processes;
using Bytes = std::vector<std::byte>;
using Counts = std::span<const std::int64_t>;

class Nccl : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (IsSkipped()) return;
    if (const std::string why = why_not("nccl"); !why.empty()) GTEST_SKIP() << why;
  }
};
class NcclOnGpus : public Nccl {
 protected:
  void SetUp() override {
    Nccl::SetUp();
    if (!IsSkipped() && gpu_count() < 2) GTEST_SKIP() << "one GPU: NCCL takes one rank per GPU";
  }
  static int ranks() { return std::min(gpu_count(), 4); }
};

// A tensor of the host, dense on the GPU, and back. On a stream: copies of pageable memory on none wait for other ranks' kernels.
class Copied {
 public:
  Copied(const ConstTensorView& host, cudaStream_t stream)
      : stream_(stream), rows_(host.shape[0]), memory_(make(host)), host_(static_cast<std::size_t>(rows_ * row_bytes_)) {
    for (std::int64_t row = 0; row < rows_ && row_bytes_ > 0; ++row) {
      std::memcpy(host_.data() + row * row_bytes_, host.row(row), static_cast<std::size_t>(row_bytes_));
    }
    cuda_check(cudaMemcpyAsync(memory_.data(), host_.data(), host_.size(), cudaMemcpyHostToDevice, stream_), "uploading a tensor");
    cuda_check(cudaStreamSynchronize(stream_), "uploading a tensor");
  }
  TensorView view() const { return view_; }
  void fetch(const TensorView& to) {
    cuda_check(cudaMemcpyAsync(host_.data(), memory_.data(), host_.size(), cudaMemcpyDeviceToHost, stream_), "downloading a tensor");
    cuda_check(cudaStreamSynchronize(stream_), "downloading a tensor");
    for (std::int64_t row = 0; row < rows_ && row_bytes_ > 0; ++row) {
      std::memcpy(to.row(row), host_.data() + row * row_bytes_, static_cast<std::size_t>(row_bytes_));
    }
  }

 private:
  DeviceBuffer make(const ConstTensorView& host) {
    int device = 0;
    cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    std::int64_t elements = 1;
    for (int d = 1; d < host.ndim; ++d) elements *= host.shape[d];
    row_bytes_ = elements * size_of(host.dtype);
    DeviceBuffer buffer = value_or_throw(make_device_buffer(device, static_cast<std::size_t>(rows_ * row_bytes_)));
    view_ = host.ndim == 1 ? TensorView(buffer.data(), host.dtype, {rows_}) : TensorView(buffer.data(), host.dtype, {rows_, elements});
    return buffer;
  }

  cudaStream_t stream_;
  std::int64_t rows_;
  std::int64_t row_bytes_ = 0;
  TensorView view_;
  DeviceBuffer memory_;
  Bytes host_;
};

// Calls with tensors of the host, so that the check of all other collectives serves.
class ThroughGpus final : public Collectives {
 public:
  explicit ThroughGpus(DeviceCollectives& device) : device_(device), stream_(value_or_throw(borrow_cuda_stream())) {}

  void barrier() override { world().barrier(); }
  void all_gather_v(const ConstTensorView& in, Counts counts, const TensorView& out) override {
    run(in, out, [&](const TensorView& from, const TensorView& to) { device_.all_gather_v(from, counts, to, stream_.get()); });
  }
  void reduce_scatter_v(const ConstTensorView& in, Counts counts, const TensorView& out) override {
    run(in, out, [&](const TensorView& from, const TensorView& to) { device_.reduce_scatter_v(from, counts, to, stream_.get()); });
  }
  // With another table beside it: both must arrive.
  void all_to_all_v(const ConstTensorView& in, Counts send_counts, const TensorView& out, Counts receive_counts) override {
    Bytes more(static_cast<std::size_t>(out.num_elements() * size_of(out.dtype)));
    TensorView beside(more.data(), out.dtype, {out.shape[0], out.shape[1]});
    Copied second(beside, stream_.get());
    run(in, out, [&](const TensorView& from, const TensorView& to) {
      const AllToAllRows tables[] = {{from, send_counts, to, receive_counts}, {from, send_counts, second.view(), receive_counts}};
      device_.all_to_all_v(tables, stream_.get());
    });
    second.fetch(beside);
    if (send_counts[world().rank()] == 0 || receive_counts[world().rank()] == 0) return;
    const std::int64_t row_bytes = out.shape[1] * size_of(out.dtype);
    for (std::int64_t row = 0; row < out.shape[0] && row_bytes > 0; ++row) {
      EXPECT_EQ(std::memcmp(out.row(row), beside.row(row), static_cast<std::size_t>(row_bytes)), 0) << "row " << row;
    }
  }
  void abandon(const Failure&) override {}
  void cancel() override {}
  const World& world() const override { return device_.world(); }
  Transport transport() const override { return Transport::automatic; }

 private:
  void run(const ConstTensorView& in, const TensorView& out, const std::function<void(const TensorView&, const TensorView&)>& call) {
    const Copied from(in, stream_.get());
    Copied to(out, stream_.get());
    call(from.view(), to.view());
    device_.wait(stream_.get());
    to.fetch(out);
  }

  DeviceCollectives& device_;
  std::shared_ptr<CUstream_st> stream_;
};

void check_random_calls(const World& world, std::uint64_t seed, bool launch_here) {
  const int gpu = use_gpu_of(world.rank());
  const auto device = DeviceCollectives::create(
      world, {.device_index = gpu, .transport = Transport::nccl, .launch_here = launch_here, .timeout_ms = 20'000});
  ThroughGpus through(*device);
  collective_test::check_collectives(through, {.seed = seed, .rounds = 15});
}

TEST_F(NcclOnGpus, RandomCallsOfRankThreads) {
  for (const bool launch_here : {false, true}) {
    const std::uint64_t seed = collective_test::test_seed();
    run_ranks(ranks(), [&](World& world) { check_random_calls(world, seed, launch_here); });
  }
}

const RegisterBody kRandomCalls("nccl.random_calls",
                                [](World& world, const std::string& seed) { check_random_calls(world, std::stoull(seed), false); });

TEST_F(NcclOnGpus, RandomCallsOfRankProcesses) {
  const std::string seed = std::to_string(collective_test::test_seed());
  for (const RankExit& exit : run_processes({.body = "nccl.random_calls", .argument = seed, .ranks = ranks()})) {
    EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank << ", seed " << seed;
  }
}

TEST_F(Nccl, RanksThatShareAGpuAreRefused) {
  run_ranks(2, [](World& world) {
    cuda_check(cudaSetDevice(0), "cudaSetDevice");
    try {
      DeviceCollectives::create(world, {.device_index = 0, .transport = Transport::nccl});
      ADD_FAILURE() << "not refused";
    } catch (const UsageError& error) {
      EXPECT_NE(std::string(error.what()).find("ranks 0 and 1 both use GPU"), std::string::npos) << error.what();
    }
  });
}

// The GPU and its context serve afterwards.
TEST_F(NcclOnGpus, ARankThatDoesNotCallEndsInATimeout) {
  std::atomic<bool> gave_up{false};
  run_ranks(2, [&](World& world) {
    const int gpu = use_gpu_of(world.rank());
    const auto device = DeviceCollectives::create(world, {.device_index = gpu, .transport = Transport::nccl, .timeout_ms = 2'000});
    const auto stream = value_or_throw(borrow_cuda_stream());
    const DeviceBuffer words = value_or_throw(make_device_buffer(gpu, 64));
    if (world.rank() == 1) {
      while (!gave_up) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return;
    }
    const std::int64_t counts[] = {0, 1};
    const AllToAllRows table{{words.data(), Dtype::uint8, {1, 16}}, counts, {words.data() + 32, Dtype::uint8, {1, 16}}, counts};
    const auto call = [&] {
      device->all_to_all_v(std::span(&table, 1), stream.get());
      device->wait(stream.get());
    };
    EXPECT_EQ(world_test::failure_of(call).kind, FailureKind::timeout);
    EXPECT_EQ(world_test::failure_of(call).kind, FailureKind::timeout);
    gave_up = true;
    EXPECT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess);
    EXPECT_EQ(cudaMemset(words.data(), 0, 64), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  });
}

// ---- the exchange ----

struct ExchangeCase {
  const char* what;
  Placement placement;
  std::vector<std::int64_t> tokens;  // of each rank
  Dtype dtype = Dtype::bfloat16;
  std::int64_t hidden_size = 72;
  int top_k = 4;
  bool wide_ids = true;
};

// One rank's input, and y: any finite elements.
struct RankInput {
  RankInput(const ExchangeCase& c, int rank, int round) : random(static_cast<unsigned>(rank * 7919 + round)) {
    const std::int64_t tokens = c.tokens[rank];
    rows = elements(tokens * c.hidden_size, c.dtype);
    input.rows = {rows.data(), c.dtype, {tokens, c.hidden_size}};
    if (c.dtype == Dtype::float8_e4m3) {
      scales = elements(tokens * 3, Dtype::float32);
      input.scales = {scales.data(), Dtype::float32, {tokens, 3}};
    }
    weights = elements(tokens * c.top_k, Dtype::float32);
    input.topk_weights = {weights.data(), Dtype::float32, {tokens, c.top_k}};
    ids.resize(static_cast<std::size_t>(tokens * c.top_k));
    for (std::int64_t& id : ids) id = static_cast<std::int64_t>(random() % (c.placement.num_experts() + 2)) - 1;  // none, unknown, twice
    narrow.assign(ids.begin(), ids.end());
    input.topk_ids = {ids.data(), Dtype::int64, {tokens, c.top_k}};
    if (!c.wide_ids) input.topk_ids = {narrow.data(), Dtype::int32, {tokens, c.top_k}};
  }
  Bytes elements(std::int64_t count, Dtype dtype) {
    Bytes bytes(static_cast<std::size_t>(count * size_of(dtype)) + 1);
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = std::ldexp(static_cast<float>(static_cast<int>(random() % 513) - 256), static_cast<int>(random() % 8) - 8);
      const std::uint16_t half = dtype == Dtype::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
      const std::uint8_t eighth = float_to_float8_e4m3(value);
      const void* const from = size_of(dtype) == 4   ? static_cast<const void*>(&value)
                               : size_of(dtype) == 2 ? static_cast<const void*>(&half)
                                                     : static_cast<const void*>(&eighth);
      std::memcpy(bytes.data() + i * size_of(dtype), from, size_of(dtype));
    }
    return bytes;
  }

  std::mt19937 random;
  Bytes rows, scales, weights;
  std::vector<std::int64_t> ids;
  std::vector<std::int32_t> narrow;
  DispatchInput input;
};

void expect_same(const char* what, const ConstTensorView& expected, const ConstTensorView& seen) {
  ASSERT_EQ(describe(seen), describe(expected)) << what;
  const auto bytes = static_cast<std::size_t>(expected.num_elements() * size_of(expected.dtype));
  if (bytes > 0) {
    EXPECT_EQ(std::memcmp(seen.data, expected.data, bytes), 0) << what;
  }
}

void expect_same(const Received& expected, const Received& seen) {
  ASSERT_EQ(seen.num_rows(), expected.num_rows());
  expect_same("rows", expected.rows(), seen.rows());
  expect_same("scales", expected.scales(), seen.scales());
  expect_same("local_ids", expected.local_ids(), seen.local_ids());
  expect_same("row_weights", expected.row_weights(), seen.row_weights());
  expect_same("source_rank", expected.source_rank(), seen.source_rank());
  expect_same("source_token", expected.source_token(), seen.source_token());
  expect_same("expert_counts", expected.expert_counts(), seen.expert_counts());
  expect_same("rank_counts", expected.rank_counts(), seen.rank_counts());
  expect_same("sent_counts", expected.sent_counts(), seen.sent_counts());
}

// Twice with the same objects: what a call leaves behind is the next one's.
void compare_with_cpu(const ExchangeCase& c, World& world) {
  SCOPED_TRACE(std::string(c.what) + ", rank " + std::to_string(world.rank()));
  const int gpu = use_gpu_of(world.rank());
  const bool is_fp8 = c.dtype == Dtype::float8_e4m3;
  const Dtype summed = is_fp8 ? Dtype::bfloat16 : c.dtype;
  ExchangeOptions options{.max_tokens_per_rank = std::max<std::int64_t>(1, *std::max_element(c.tokens.begin(), c.tokens.end())),
                          .max_row_bytes = c.hidden_size * size_of(summed),
                          .max_scale_bytes = is_fp8 ? 12 : 0,
                          .top_k = c.top_k,
                          .max_local_experts = std::max(1, c.placement.max_local_experts()),
                          .max_fanout = c.placement.max_fanout(),
                          .transport = Transport::inproc,
                          .validate = false,
                          .timeout_ms = 20'000};
  Exchange reference(world, options);
  reference.add(c.placement);
  options.device = Device::cuda;
  options.device_index = gpu;
  CudaCollectiveExchange exchange(world, c.placement, options);
  const auto stream = value_or_throw(borrow_cuda_stream());
  for (int round = 0; round < 2; ++round) {
    RankInput host(c, world.rank(), round);
    const Received expected = reference.dispatch(host.input);
    const Copied rows(host.input.rows, stream.get()), ids(host.input.topk_ids, stream.get()),
        weights(host.input.topk_weights, stream.get());
    const Copied scales(is_fp8 ? host.input.scales : host.input.topk_weights, stream.get());
    DispatchInput input{.rows = rows.view(), .topk_ids = ids.view(), .topk_weights = weights.view()};
    if (is_fp8) input.scales = scales.view();
    const Received received = exchange.dispatch(input, stream.get());
    exchange.wait(stream.get());
    expect_same(expected, exchange_internal::to_host(received, stream.get()));
    if (received.num_rows() != expected.num_rows()) return;

    const Bytes y = host.elements(expected.num_rows() * c.hidden_size, summed);
    const ConstTensorView y_view{y.data(), summed, {expected.num_rows(), c.hidden_size}};
    const Combined sums = reference.combine(y_view, expected.handle());
    Bytes out(static_cast<std::size_t>(sums.out.num_elements() * size_of(summed)) + 1);
    const TensorView out_view(out.data(), summed, {sums.out.shape[0], c.hidden_size});
    const Copied device_y(y_view, stream.get());
    Copied device_out(out_view, stream.get());
    exchange.combine(device_y.view(), device_out.view(), stream.get());
    exchange.wait(stream.get());
    device_out.fetch(out_view);
    expect_same("sums", sums.out, out_view);
  }
}

// tokens[r] of rank r, as often as there are ranks.
std::vector<std::int64_t> tokens_of(int ranks, std::initializer_list<std::int64_t> tokens) {
  std::vector<std::int64_t> result;
  for (int rank = 0; rank < ranks; ++rank) result.push_back(*(tokens.begin() + rank % tokens.size()));
  return result;
}

TEST_F(NcclOnGpus, TheExchangeIsThatOfTheCpuBitForBit) {
  const int n = ranks();
  const std::vector<double> load(8, 1.0);
  const std::vector<ExchangeCase> cases = {
      {"uneven", Placement::uniform(9, n), tokens_of(n, {700, 13})},
      {"no tokens on one rank", Placement::uniform(8, n), tokens_of(n, {0, 300})},
      {"no tokens at all", Placement::uniform(8, n), tokens_of(n, {0})},
      {"a rank without experts", Placement::uniform(1, n), tokens_of(n, {40, 50}), Dtype::float32},
      {"one expert per token", Placement::uniform(16, n), tokens_of(n, {257}), Dtype::float16, 1024, 1, false},
      {"fp8 and scales", Placement::uniform(32, n), tokens_of(n, {128, 127}), Dtype::float8_e4m3, 384, 8},
      {"many choices", Placement::uniform(300, n), tokens_of(n, {65}), Dtype::bfloat16, 2048, 40, false},
      {"every rank has every expert", Placement::tensor_parallel(8, 1, n), tokens_of(n, {90, 30})},
      {"replicas", Placement::replicated(8, n, load, 4), tokens_of(n, {512, 511})},
      {"long rows", Placement::uniform(64, n), tokens_of(n, {600}), Dtype::bfloat16, 7168, 8},
  };
  for (const ExchangeCase& c : cases) {
    run_ranks(n, [&](World& world) { compare_with_cpu(c, world); });
  }
}

}  // namespace
}  // namespace tokenyard::device_test
