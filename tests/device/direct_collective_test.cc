// Collectives over peer memory on GPUs, against plain loops and against the CPUs' collectives, bit for bit. Rank r has GPU
// r % GPUs; without a GPU all of it is skipped.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "device/gpus.h"
#include "device/through_gpus.h"
#include "memory/cuda_graph.h"
#include "memory/cuda_handle.h"
#include "multirank/collective_check.h"
#include "multirank/exchange_processes.h"
#include "multirank/world_failures.h"

namespace tokenyard::device_test {
namespace {

using Bytes = std::vector<std::byte>;
using Numbers = std::vector<std::int64_t>;
using exchange_test::RegisterBody;
using exchange_test::run_processes;
using world_test::failure_of;

constexpr std::size_t kTensorBytes = std::size_t{32} << 20;

// One rank: its GPU, its stream and what it owns there.
struct Rank {
  explicit Rank(const World& of, DeviceCollectiveOptions options = {}, std::size_t tensor_bytes = kTensorBytes)
      : world(of), gpu(use_gpu_of(of.rank())), stream(value_or_throw(borrow_cuda_stream())), tensors(gpu, tensor_bytes, stream.get()) {
    options.device_index = gpu;
    if (options.transport == Transport::automatic) options.transport = Transport::cuda_peer;
    if (options.sm_budget == 0) options.sm_budget = sm_budget_of(gpu, of.size());
    device = DeviceCollectives::create(of, options);
    through.emplace(*device, tensors, stream.get());
  }
  // All ranks' numbers, of a call that must succeed.
  void gather_numbers(const Numbers& counts) {
    std::int64_t total = 0;
    for (const std::int64_t count : counts) total += count;
    const Numbers mine(counts[world.rank()], world.rank());
    Numbers all(total, -1);
    through->all_gather_v({mine.data(), Dtype::int64, {counts[world.rank()]}}, counts, {all.data(), Dtype::int64, {total}});
    std::size_t i = 0;
    for (std::size_t source = 0; source < counts.size(); ++source) {
      for (std::int64_t n = 0; n < counts[source]; ++n) ASSERT_EQ(all[i++], static_cast<std::int64_t>(source));
    }
  }

  const World& world;
  int gpu;
  std::shared_ptr<CUstream_st> stream;
  DeviceTensors tensors;
  std::unique_ptr<DeviceCollectives> device;
  std::optional<ThroughGpus> through;
};

class DirectOnGpu : public OnGpu {};
class DirectOnGpuRanks : public OnGpu, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Ranks, DirectOnGpuRanks, testing::Values(1, 2, 3, 5, 8),
                         [](const auto& info) { return std::to_string(info.param) + "_ranks"; });

void check_random_calls(const World& world, std::uint64_t seed, int rounds, Transport transport = Transport::cuda_peer) {
  for (const std::int64_t staging_bytes : {std::int64_t{4} << 20, std::int64_t{4096}, std::int64_t{50'000}}) {
    Rank rank(world, {.transport = transport, .staging_bytes = staging_bytes});
    EXPECT_EQ(rank.device->transport(), transport);
    for (const std::int64_t multiple : {1, 8}) {
      collective_test::check_collectives(*rank.through, {.seed = seed, .rounds = rounds, .multiple_of = multiple});
    }
    world.barrier();
  }
}

TEST_P(DirectOnGpuRanks, RandomCallsAsThreads) {
  const std::uint64_t seed = collective_test::test_seed();
  run_ranks(GetParam(), [&](World& world) { check_random_calls(world, seed, 8); });
}

class DirectOnWindows : public OnWindowsOfSeveral {};

TEST_F(DirectOnWindows, RandomCallsAsThreads) {
  const std::uint64_t seed = collective_test::test_seed();
  run_ranks(ranks(), [&](World& world) { check_random_calls(world, seed, 8, Transport::nccl_window); });
}

TEST_P(DirectOnGpuRanks, FarLargerThanStaging) {
  run_ranks(GetParam(), [](World& world) {
    Rank rank(world, {.staging_bytes = 256 << 10});
    for (const std::int64_t multiple : {1, 16}) {
      collective_test::check_collectives(*rank.through,
                                         {.seed = 7, .rounds = 1, .max_rows = 300, .max_elements = 2000, .multiple_of = multiple});
    }
    world.barrier();
  });
}

const RegisterBody kRandomCalls("direct_on_gpu.random_calls",
                                [](World& world, const std::string& seed) { check_random_calls(world, std::stoull(seed), 5); });

TEST_F(DirectOnGpu, RandomCallsAsProcesses) {
  const std::string seed = std::to_string(collective_test::test_seed());
  const int ranks = std::min(gpu_count(), 4);
  for (const RankExit& exit : run_processes({.body = "direct_on_gpu.random_calls", .argument = seed, .ranks = ranks})) {
    EXPECT_EQ(exit.exit_code, 0) << "rank " << exit.rank << ", seed " << seed;
  }
}

// Any bits at all, and so NaNs, infinities, denormals and zeros of both signs.
Bytes any_bits(std::size_t bytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Bytes result(bytes);
  for (std::byte& byte : result) byte = static_cast<std::byte>(random());
  return result;
}

// Counts that only the device knows, other ones for each replay of one graph: rows lie as with the host's counts, and what is behind
// them stays.
TEST_P(DirectOnGpuRanks, CountsOfTheDeviceFollowEachReplay) {
  run_ranks(GetParam(), [](World& world) {
    constexpr std::int64_t kMost = 5, kColumns = 33;
    const int ranks = world.size();
    Rank rank(world);
    const auto cpu = Collectives::create(world);
    std::vector<float> mine(kMost * kColumns), all(ranks * kMost * kColumns, -1.0F), terms(all.size()), sums(mine.size(), -1.0F);
    for (std::size_t i = 0; i < terms.size(); ++i) terms[i] = static_cast<float>((i * 7 + world.rank() * 13) % 101) / 8.0F;
    for (std::size_t i = 0; i < mine.size(); ++i) mine[i] = static_cast<float>(world.rank() * 1000 + static_cast<int>(i));
    std::vector<std::int32_t> counts(ranks);
    const TensorView in(mine.data(), Dtype::float32, {kMost, kColumns}), gathered(all.data(), Dtype::float32, {ranks * kMost, kColumns});
    const TensorView parts(terms.data(), Dtype::float32, {ranks * kMost, kColumns}), sum(sums.data(), Dtype::float32, {kMost, kColumns});
    const TensorView table(counts.data(), Dtype::int32, {ranks});
    const auto place = [&](const TensorView& host) { return rank.tensors.place(host); };
    const TensorView d_in = place(in), d_all = place(gathered), d_parts = place(parts), d_sum = place(sum), d_table = place(table);
    const DeviceCounts on_device = {.counts = d_table, .most = kMost};
    world.barrier();
    const CudaGraph graph(rank.stream.get(), [&] {
      rank.device->all_gather_v(d_in, on_device, d_all, rank.stream.get());
      rank.device->reduce_scatter_v(d_parts, on_device, d_sum, rank.stream.get());
    });
    for (int replay = 0; replay < 6; ++replay) {
      for (int r = 0; r < ranks; ++r) counts[r] = (r * 3 + replay * 2) % (static_cast<int>(kMost) + 2);  // one of them too many
      Numbers bounded(counts.begin(), counts.end());
      for (std::int64_t& count : bounded) count = std::min(count, kMost);
      const std::int64_t total = std::accumulate(bounded.begin(), bounded.end(), std::int64_t{0}), own = bounded[world.rank()];
      std::vector<float> expected_all = all, expected_sum = sums;
      cpu->all_gather_v({in.data, in.dtype, {own, kColumns}}, bounded, {expected_all.data(), Dtype::float32, {total, kColumns}});
      cpu->reduce_scatter_v({parts.data, parts.dtype, {total, kColumns}}, bounded, {expected_sum.data(), Dtype::float32, {own, kColumns}});
      cuda_check(cudaMemcpy(d_table.data, counts.data(), counts.size() * sizeof(counts[0]), cudaMemcpyHostToDevice), "cudaMemcpy");
      world.barrier();
      graph.launch();
      rank.device->wait(rank.stream.get());
      rank.tensors.fetch(gathered), rank.tensors.fetch(sum);
      EXPECT_EQ(all, expected_all) << "replay " << replay;
      EXPECT_EQ(sums, expected_sum) << "replay " << replay;
    }
    world.barrier();
  });
}

TEST_P(DirectOnGpuRanks, SumsOfAnyBitsAreThoseOfTheCpu) {
  run_ranks(GetParam(), [](World& world) {
    Rank rank(world);
    const auto cpu = Collectives::create(world);
    for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
      for (const std::int64_t elements : {1, 7, 1024}) {
        Numbers counts(world.size());
        for (int peer = 0; peer < world.size(); ++peer) counts[peer] = (peer * 5 + elements) % 7;
        std::int64_t total = 0;
        for (const std::int64_t count : counts) total += count;
        const std::int64_t row_bytes = elements * size_of(dtype), mine = counts[world.rank()];
        const Bytes in = any_bits(static_cast<std::size_t>(total * row_bytes), static_cast<std::uint64_t>(world.rank() + 17 * elements));
        Bytes expected(static_cast<std::size_t>(mine * row_bytes)), seen(expected.size());
        const ConstTensorView from{in.data(), dtype, {total, elements}};
        cpu->reduce_scatter_v(from, counts, {expected.data(), dtype, {mine, elements}});
        rank.through->reduce_scatter_v(from, counts, {seen.data(), dtype, {mine, elements}});
        EXPECT_EQ(seen, expected) << name(dtype) << ", rows of " << elements << ", rank " << world.rank();
      }
    }
    world.barrier();
  });
}

// ---- streams and graphs ----

// Three calls on one rank's memory: what every rank gathers, sums of that in place, and the sums back to everybody.
class Chain {
 public:
  Chain(Rank& rank, std::int64_t rows, std::int64_t elements)
      : rank_(rank), ranks_(rank.world.size()), rows_(rows), elements_(elements), host_(static_cast<std::size_t>(rows * elements)) {
    for (int peer = 0; peer < ranks_; ++peer) counts_.push_back(peer % 3 == 1 ? 0 : rows);
    for (const std::int64_t count : counts_) total_ += count;
    all_.resize(static_cast<std::size_t>(total_ * elements_));
    sums_.resize(all_.size());
    in_ = rank.tensors.place(view(host_, counts_[rank.world.rank()]));
    gathered_ = rank.tensors.place(view(all_, total_));
    again_ = rank.tensors.place(view(sums_, total_));
  }

  void enqueue(cudaStream_t stream) {
    const std::int64_t first = first_row(), mine = counts_[rank_.world.rank()];
    rank_.device->all_gather_v(in_, counts_, gathered_, stream);
    TensorView own = gathered_;
    own.data = gathered_.row(first);
    own.shape[0] = mine;
    rank_.device->reduce_scatter_v(gathered_, counts_, own, stream);
    Numbers send(ranks_, 0);
    TensorView out = again_;
    // Everybody's sums to everybody: the same rows once per destination, and so one call for each.
    for (int to = 0; to < ranks_; ++to) {
      std::fill(send.begin(), send.end(), 0);
      send[to] = mine;
      const Numbers receive = to == rank_.world.rank() ? counts_ : Numbers(ranks_, 0);
      out.shape[0] = to == rank_.world.rank() ? total_ : 0;
      const AllToAllRows table{own, send, out, receive};
      rank_.device->all_to_all_v(std::span(&table, 1), stream);
    }
  }

  // Small numbers, so that sums are exact. On the stream of the rank.
  void draw(unsigned round) {
    for (std::size_t i = 0; i < host_.size(); ++i) host_[i] = value(rank_.world.rank(), i, round);
    const auto bytes = static_cast<std::size_t>(in_.num_elements()) * sizeof(float);
    if (bytes > 0) cuda_check(cudaMemcpyAsync(in_.data, host_.data(), bytes, cudaMemcpyHostToDevice, rank_.stream.get()), "drawing");
    cuda_check(cudaStreamSynchronize(rank_.stream.get()), "drawing");
  }
  void expect(unsigned round) {
    rank_.device->wait(rank_.stream.get());
    rank_.tensors.fetch(TensorView(sums_.data(), Dtype::float32, {total_, elements_}));
    std::size_t at = 0;
    for (int source = 0; source < ranks_; ++source) {
      for (std::int64_t i = 0; i < counts_[source] * elements_; ++i, ++at) {
        ASSERT_EQ(sums_[at], ranks_ * value(source, static_cast<std::size_t>(i), round)) << "round " << round << ", element " << at;
      }
    }
  }

 private:
  static float value(int rank, std::size_t i, unsigned round) { return static_cast<float>((rank * 31 + i * 7 + round * 13) % 1000); }
  ConstTensorView view(const std::vector<float>& memory, std::int64_t rows) const {
    return {memory.data(), Dtype::float32, {rows, elements_}};
  }
  std::int64_t first_row() const {
    std::int64_t first = 0;
    for (int peer = 0; peer < rank_.world.rank(); ++peer) first += counts_[peer];
    return first;
  }

  Rank& rank_;
  int ranks_;
  std::int64_t rows_, elements_;
  std::int64_t total_ = 0;
  Numbers counts_;
  std::vector<float> host_, all_, sums_;
  TensorView in_, gathered_, again_;
};

TEST_P(DirectOnGpuRanks, GraphsReplayBesideEagerCalls) {
  run_ranks(GetParam(), [](World& world) {
    Rank rank(world, {.staging_bytes = 64 << 10});
    Chain chain(rank, 21, 132);
    const CudaGraph graph(rank.stream.get(), [&] { chain.enqueue(rank.stream.get()); });
    world.barrier();  // uploading a graph may wait for kernels
    for (unsigned round = 0; round < 24; ++round) {
      chain.draw(round);
      if (round % 5 == 3) {
        chain.enqueue(rank.stream.get());
      } else {
        graph.launch();
      }
      chain.expect(round);
    }
    world.barrier();
  });
}

TEST_F(DirectOnGpu, CallsRunInOrderWhateverTheirStreams) {
  run_ranks(3, [](World& world) {
    Rank rank(world);
    const auto other = value_or_throw(borrow_cuda_stream());
    Chain chain(rank, 300, 1024);
    world.barrier();
    for (unsigned round = 0; round < 6; ++round) {
      chain.draw(round);
      chain.enqueue(round % 2 == 0 ? other.get() : rank.stream.get());
      rank.device->wait(other.get());
      chain.expect(round);
    }
    world.barrier();
  });
}

// ---- failures ----

TEST_F(DirectOnGpu, ARejectedCallFailsOnPeersWithTheReasonAndTheNextIsFine) {
  run_ranks(4, [](World& world) {
    Rank rank(world, {.timeout_ms = 20'000});
    for (int round = 0; round < 4; ++round) {
      if (world.rank() == 2) {
        const Numbers wrong{1, 1, 1, -7};
        std::int64_t numbers[4] = {};
        EXPECT_THROW(rank.through->all_gather_v({numbers, Dtype::int64, {1}}, wrong, {numbers, Dtype::int64, {4}}), UsageError);
      } else {
        const Failure failure = failure_of([&] { rank.gather_numbers({1, 1, 1, 1}); });
        EXPECT_EQ(failure.kind, FailureKind::aborted);
        EXPECT_EQ(failure.peer, 2);
        EXPECT_EQ(failure.rank, world.rank());
        EXPECT_NE(failure.detail.find("counts[3] is -7"), std::string::npos) << failure.detail;
      }
      rank.gather_numbers({500, 0, 3, 1200});
    }
    world.barrier();
  });
}

TEST_F(DirectOnGpu, WrongTensorsAreRefused) {
  run_ranks(1, [](World& world) {
    Rank rank(world);
    const auto refused = [&](const char* text, const ConstTensorView& in, const TensorView& out) {
      const Numbers counts{1};
      try {
        rank.device->reduce_scatter_v(in, counts, out, rank.stream.get());
        ADD_FAILURE() << "not refused: " << text;
      } catch (const UsageError& error) {
        EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
      }
    };
    std::vector<float> host(64), more(64);
    const TensorView in = rank.tensors.place(ConstTensorView{host.data(), Dtype::float32, {16, 4}});
    std::byte* const at = static_cast<std::byte*>(in.data);
    const TensorView out{at + 512, Dtype::float32, {1, 4}};
    refused("ordinary host memory", ConstTensorView{host.data(), Dtype::float32, {1, 4}}, out);
    refused("must lie at multiples of 4", ConstTensorView{at + 2, Dtype::float32, {1, 4}}, out);
    refused("overlap", ConstTensorView{at, Dtype::float32, {1, 4}}, {at + 8, Dtype::float32, {1, 4}});
    refused("cannot add int32", ConstTensorView{at, Dtype::int32, {1, 4}}, {at + 64, Dtype::int32, {1, 4}});
    rank.gather_numbers({3});
  });
}

TEST_F(DirectOnGpu, DifferentCallsAreNamedAndStay) {
  run_ranks(3, [](World& world) {
    Rank rank(world, {.timeout_ms = 20'000});
    rank.gather_numbers({2, 2, 2});
    const Failure failure = failure_of([&] { rank.gather_numbers({1, 2, world.rank() == 0 ? 4 : 3}); });
    EXPECT_EQ(failure.kind, FailureKind::mismatch) << failure.message();
    EXPECT_EQ(failure_of([&] { rank.gather_numbers({1, 1, 1}); }).kind, FailureKind::mismatch) << "it stays";
    world.barrier();
    EXPECT_EQ(cudaStreamSynchronize(rank.stream.get()), cudaSuccess);
  });
}

TEST_F(DirectOnGpu, BothEndsOfAMismatchSayWhatWasCalled) {
  run_ranks(2, [](World& world) {
    Rank rank(world, {.timeout_ms = 20'000});
    const Failure failure = failure_of([&] { rank.gather_numbers({2, world.rank() == 0 ? 5 : 3}); });
    EXPECT_EQ(failure.kind, FailureKind::mismatch);
    EXPECT_EQ(failure.peer, 1 - world.rank());
    const bool told = failure.detail.find("own error tells more") != std::string::npos;  // the other rank was faster
    EXPECT_TRUE(told || failure.detail.find(world.rank() == 0 ? "expects 5" : "expects 2") != std::string::npos) << failure.detail;
    EXPECT_TRUE(told || failure.detail.find("all_gather_v of rows of 8 bytes of int64") != std::string::npos) << failure.detail;
    world.barrier();
  });
}

TEST_F(DirectOnGpu, TheRankThatDoesNotCallIsNamedAndTheGpuServesOn) {
  run_ranks(3, [](World& world) {
    Rank rank(world, {.timeout_ms = 500});
    rank.gather_numbers({1, 2, 3});
    if (world.rank() != 1) {
      const Failure failure = failure_of([&] { rank.gather_numbers({4, 4, 4}); });
      EXPECT_EQ(failure.kind, FailureKind::timeout);
      EXPECT_EQ(failure.peer, 1);
      EXPECT_EQ(failure.phase, Phase::collective);
      EXPECT_EQ(failure.epoch, 2U);
      EXPECT_EQ(failure.expected, 2);
      EXPECT_EQ(failure.seen, 1);
      EXPECT_EQ(failure_of([&] { rank.gather_numbers({4, 4, 4}); }).kind, FailureKind::timeout) << "it stays";
    }
    world.barrier();
    EXPECT_EQ(cudaStreamSynchronize(rank.stream.get()), cudaSuccess);
    if (world.rank() == 1) {
      EXPECT_EQ(failure_of([&] { rank.gather_numbers({4, 4, 4}); }).kind, FailureKind::timeout);
    }
    world.barrier();
    Rank fresh(world);  // the context lives
    fresh.gather_numbers({3, 2, 1});
    world.barrier();
  });
}

TEST_F(DirectOnGpu, ALostThreadIsNoticedAtOnce) {
  const world_test::Stopwatch watch;
  std::vector<std::unique_ptr<Rank>> ranks(3);  // freed at the end: freeing waits for kernels of ranks that share the GPU
  try {
    run_ranks(3, [&](World& world) {
      ranks[world.rank()] = std::make_unique<Rank>(world);
      Rank& rank = *ranks[world.rank()];
      rank.gather_numbers({1, 2, 3});
      if (world.rank() == 1) throw std::runtime_error("rank 1 gives up");
      const Failure failure = failure_of([&] { rank.gather_numbers({5000, 5000, 5000}); });
      EXPECT_EQ(failure.kind, FailureKind::peer_lost);
      EXPECT_EQ(failure.peer, 1);
    });
    ADD_FAILURE() << "run_ranks did not rethrow";
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "rank 1 gives up");
  }
  EXPECT_LT(watch.ms(), 20'000);  // the deadline is 100 s
}

TEST_F(DirectOnGpu, OptionsAreCheckedAndAgreed) {
  run_ranks(2, [](World& world) {
    const int gpu = use_gpu_of(world.rank());
    EXPECT_THROW(DeviceCollectives::create(world, {.device_index = gpu, .transport = Transport::cuda_peer, .staging_bytes = 100}),
                 UsageError);
    EXPECT_THROW(DeviceCollectives::create(world, {.device_index = 4096, .transport = Transport::cuda_peer}), UsageError);
    EXPECT_THROW(DeviceCollectives::create(world, {.device_index = gpu, .transport = Transport::shm}), UsageError);
    const Failure failure = failure_of([&] {
      DeviceCollectives::create(world,
                                {.device_index = gpu, .transport = Transport::cuda_peer, .staging_bytes = world.rank() == 0 ? 8192 : 4096});
    });
    EXPECT_EQ(failure.kind, FailureKind::mismatch);
    EXPECT_NE(failure.detail.find("8192"), std::string::npos) << failure.detail;
  });
}

}  // namespace
}  // namespace tokenyard::device_test
