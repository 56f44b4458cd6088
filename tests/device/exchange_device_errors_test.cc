// What callers can get wrong on GPUs alone, and what an exchange leaves behind there: nothing.

#include <gtest/gtest.h>

#include <functional>
#include <stdexcept>

#include "device/gpus.h"
#include "device/twin.h"
#include "memory/sm_budget.h"
#include "multirank/exchange_rejection.h"

namespace tokenyard::device_test {
namespace {

using exchange_test::expect_rejection;
using exchange_test::expect_usage_error;

constexpr int kRanks = 2;
constexpr int kCulprit = 1;

class DeviceErrors : public OnGpu {};

// A tensor of ordinary host memory.
TensorView on_host(std::initializer_list<std::int64_t> shape, Dtype dtype = Dtype::float32) {
  static std::vector<float> memory(std::size_t{1} << 16, 1.0F);
  return {memory.data(), dtype, shape};
}

struct BadDispatch {
  std::string text;
  std::function<void(DispatchInput&, DispatchOptions&)> spoil;
};

TEST_F(DeviceErrors, DispatchTakesNoHostMemory) {
  using In = DispatchInput;
  using Op = DispatchOptions;
  const BatchShape shape;
  const std::int64_t tokens = shape.max_tokens;
  const BadDispatch all[] = {
      {"rows is [24, 64] float32 in ordinary host memory",
       [=](In& in, Op&) {
         in.rows = on_host({tokens, shape.hidden_size});
       }},
      {"scales is [24, 4] float32 in ordinary host memory",
       [=](In& in, Op&) {
         in.scales = on_host({tokens, 4});
       }},
      {"topk_ids is [24, 3] int64 in ordinary host memory",
       [=](In& in, Op&) {
         in.topk_ids = on_host({tokens, 3}, Dtype::int64);
       }},
      {"topk_weights is [24, 3] float32 in ordinary host memory",
       [=](In& in, Op&) {
         in.topk_weights = on_host({tokens, 3});
       }},
      {"out_rows is [48, 64] float32 in ordinary host memory",
       [=](In&, Op& op) {
         op.copy_out = true;
         op.out_rows = on_host({2 * tokens, shape.hidden_size});
       }},
      {"waits is [2] int64 in ordinary host memory", [=](In&, Op& op) { op.waits = on_host({kRanks}, Dtype::int64); }},
      {"copy it to the GPU first",
       [=](In& in, Op&) {
         in.rows = on_host({tokens, shape.hidden_size});
       }},
  };
  run_ranks(kRanks, [&](World& world) {
    Twin twin(world, [](ExchangeOptions& options) { options.max_scale_bytes = 16; });
    const DispatchOptions options{.stream = twin.batch.stream()};
    for (const BadDispatch& bad : all) {
      DispatchInput input = twin.batch.input();
      DispatchOptions spoiled = options;
      bad.spoil(input, spoiled);
      const auto good = [&] { twin.device.dispatch(twin.batch.input(), options); };
      expect_rejection(world, kCulprit, bad.text, good, [&] { twin.device.dispatch(input, spoiled); });
      expect_rejection(world, kCulprit, bad.text, good, [&] { twin.device.start_dispatch(input, spoiled); });
      ASSERT_NO_THROW(good()) << "after " << bad.text;
    }
    twin.expect_same(twin.device.dispatch(twin.batch.input(), options), twin.expected(options).received, "at the end");
  });
}

struct BadCombine {
  std::string text;
  std::function<void(ConstTensorView&, CombineOptions&)> spoil;
};

TEST_F(DeviceErrors, CombineTakesNoHostMemoryAndNoFloat64) {
  using Y = ConstTensorView;
  using Op = CombineOptions;
  const BatchShape shape;
  const TensorView per_token = on_host({shape.max_tokens, shape.hidden_size});
  const BadCombine all[] = {
      {"in ordinary host memory", [](Y& y, Op&) { y.data = on_host({1}).data; }},
      {"out is [24, 64] float32 in ordinary host memory", [=](Y&, Op& op) { op.out = per_token; }},
      {"bias0 is [24, 64] float32 in ordinary host memory", [=](Y&, Op& op) { op.bias0 = per_token; }},
      {"bias1 is [24, 64] float32 in ordinary host memory", [=](Y&, Op& op) { op.bias1 = per_token; }},
      {"waits is [2] int64 in ordinary host memory", [=](Y&, Op& op) { op.waits = on_host({kRanks}, Dtype::int64); }},
      {"source_weights is [24, 3] float32 in ordinary host memory",
       [=](Y&, Op& op) {
         op.weighting = Weighting::at_source;
         op.source_weights = on_host({shape.max_tokens, 3});
       }},
      {"in ordinary host memory", [](Y& y, Op& op) { op.row_weights = on_host({y.shape[0]}); }},
      {"on GPUs combine adds float32, bfloat16 and float16",
       [](Y& y, Op&) {
         y.dtype = Dtype::float64;
         y.shape[1] /= 2;
         y.strides[0] /= 2;
       }},
      {"out is [24, 64] float64",
       [=](Y&, Op& op) {
         op.out = on_host({shape.max_tokens, shape.hidden_size}, Dtype::float64);
       }},
  };
  run_ranks(kRanks, [&](World& world) {
    Twin twin(world);
    const DispatchOptions options{.layout = Layout::expert_major, .stream = twin.batch.stream()};
    RoundTrip trip;
    trip.received = twin.device.dispatch(twin.batch.input(), options);
    const Handle handle = trip.received.handle();
    const auto good = [&] {
      trip.combined = twin.device.combine(trip.received.rows(), handle, {.stream = options.stream});
      cuda_check(cudaStreamSynchronize(twin.batch.stream()), "cudaStreamSynchronize");
      twin.device.check();
    };
    for (const BadCombine& bad : all) {
      ConstTensorView y = trip.received.rows();
      CombineOptions spoiled{.stream = options.stream};
      bad.spoil(y, spoiled);
      expect_rejection(world, kCulprit, bad.text, good, [&] { twin.device.combine(y, handle, spoiled); });
      expect_rejection(world, kCulprit, bad.text, good, [&] { twin.device.start_combine(y, handle, spoiled); });
      ASSERT_NO_THROW(good()) << "after " << bad.text;
    }
    twin.expect_same(trip, twin.expected(options), "at the end");
  });
}

TEST_F(DeviceErrors, PinnedHostMemoryServes) {
  run_ranks(kRanks, [](World& world) {
    const PinnedBuffer pinned = value_or_throw(make_pinned_buffer(std::size_t{1} << 16));
    Twin twin(world);
    const DispatchOptions options{.stream = twin.batch.stream()};
    DispatchInput input = twin.batch.input();
    std::copy_n(twin.batch.input(Device::cpu).rows.as<float>(), input.rows.num_elements(), pinned.as<float>());
    input.rows.data = pinned.data();
    twin.expect_same(twin.device.dispatch(input, options), twin.expected(options).received, "rows in pinned memory");
  });
}

// Found when the memory is chosen, behind the call: peers are not told, and nothing is out of step.
TEST_F(DeviceErrors, TooLittleMemoryForCopiesIsRefused) {
  run_ranks(kRanks, [](World& world) {
    Twin twin(world);
    DispatchOptions options{.sizing = Sizing::capacity, .copy_out = true, .stream = twin.batch.stream()};
    options.out_rows = TensorView(twin.batch.reserve(64 * 4), Dtype::float32, {1, 64});
    expect_usage_error("out_rows has 1 rows", [&] { twin.device.dispatch(twin.batch.input(), options); });
    options.out_rows = {};
    twin.expect_same(twin.device.dispatch(twin.batch.input(), options), twin.expected(options).received, "next");
  });
}

// Where the kernel that lands rows also copies them, memory is chosen before the call: whatever goes wrong there is told to the peers.
TEST_F(DeviceErrors, NoMemoryForPaddedCopiesIsTold) {
  run_ranks(kRanks, [](World& world) {
    Twin twin(world);
    const DispatchOptions options{.layout = Layout::expert_padded,
                                  .sizing = Sizing::capacity,
                                  .mode = Mode::latency,
                                  .copy_out = true,
                                  .stream = twin.batch.stream()};
    const auto good = [&] {
      twin.device.dispatch(twin.batch.input(), options);
      cuda_check(cudaStreamSynchronize(twin.batch.stream()), "cudaStreamSynchronize");
      twin.device.check();
    };
    DispatchOptions small = options;
    small.out_rows = TensorView(twin.batch.reserve(64 * 4), Dtype::float32, {1, 64});
    expect_rejection(world, kCulprit, "out_rows has 1 rows", good, [&] { twin.device.dispatch(twin.batch.input(), small); });
    good();
    DispatchOptions failing = options;
    failing.allocate_out = [](std::int64_t, std::int64_t, std::int64_t) -> OutMemory {
      throw std::runtime_error("the allocator has none");
    };
    if (world.rank() == kCulprit) {
      EXPECT_THROW(twin.device.dispatch(twin.batch.input(), failing), std::runtime_error);
    } else {
      exchange_test::expect_aborted(world, kCulprit, "the allocator has none", good);
    }
    twin.expect_same(twin.device.dispatch(twin.batch.input(), options), twin.expected(options).received, "next");
  });
}

// There is room for one text: of the first of two calls that were refused before anybody looked, it says that it speaks of the second.
TEST_F(DeviceErrors, TwoRefusedCallsInARow) {
  run_ranks(kRanks, [](World& world) {
    Twin twin(world);
    const DispatchOptions options{.stream = twin.batch.stream()};
    const auto good = [&] { twin.device.dispatch(twin.batch.input(), options); };
    good();
    if (world.rank() == kCulprit) {
      DispatchInput no_rows = twin.batch.input(), no_ids = twin.batch.input();
      no_rows.rows = on_host({twin.batch.tokens(), 64});
      no_ids.topk_ids = on_host({twin.batch.tokens(), 3}, Dtype::int64);
      expect_usage_error("rows is", [&] { twin.device.dispatch(no_rows, options); });
      expect_usage_error("topk_ids is", [&] { twin.device.dispatch(no_ids, options); });
      cuda_check(cudaStreamSynchronize(twin.batch.stream()), "cudaStreamSynchronize");
    }
    world.barrier();
    if (world.rank() != kCulprit) {
      exchange_test::expect_aborted(world, kCulprit, "rejected this and later calls; of call 3: topk_ids is", good);
      exchange_test::expect_aborted(world, kCulprit, "topk_ids is", good);
    }
    EXPECT_NO_THROW(good());
  });
}

struct BadOption {
  std::string text;
  std::function<void(ExchangeOptions&)> spoil;
};

TEST_F(DeviceErrors, OptionsOfGpus) {
  World world = std::move(World::in_process(1)[0]);
  Batch batch(world);
  const BadOption all[] = {
      {"device_index = 4096; CUDA sees " + std::to_string(gpu_count()), [](ExchangeOptions& o) { o.device_index = 4096; }},
      {"device_index = -2", [](ExchangeOptions& o) { o.device_index = -2; }},
      {"transport = inproc with device = cuda", [](ExchangeOptions& o) { o.transport = Transport::inproc; }},
      {"transport = shm with device = cuda", [](ExchangeOptions& o) { o.transport = Transport::shm; }},
      {"use cuda_peer, nccl_window or automatic", [](ExchangeOptions& o) { o.transport = Transport::mpi; }},
      {"transport cuda_peer uses none", [](ExchangeOptions& o) { o.nccl_communicator = &o; }},
      {"sm_budget = 100000 on GPU 0: 0 of its", [](ExchangeOptions& o) { o.sm_budget = 100'000; }},
      {"sm_budget = -3", [](ExchangeOptions& o) { o.sm_budget = -3; }},
  };
  for (const BadOption& bad : all) {
    ExchangeOptions options = batch.options();
    bad.spoil(options);
    expect_usage_error(bad.text, [&] { const Exchange exchange(world, options); });
  }
  EXPECT_EQ(Exchange(world, batch.options()).transport(), Transport::cuda_peer);
}

TEST_F(DeviceErrors, ExchangesShareTheMultiprocessorsOfAGpu) {
  World world = std::move(World::in_process(1)[0]);
  Batch batch(world);
  ExchangeOptions most = batch.options(), some = batch.options();
  most.sm_budget = multiprocessors_of(most.device_index) - 1;
  some.sm_budget = 2;
  {
    const Exchange first(world, most);
    expect_usage_error("choose at most 1", [&] { const Exchange second(world, some); });
    some.sm_budget = 1;
    const Exchange second(world, some);
    some.sm_budget = 0;
    expect_usage_error("are taken by other exchanges of this process", [&] { const Exchange third(world, some); });
  }
  const Exchange again(world, most);  // given back
  EXPECT_EQ(again.options().sm_budget, most.sm_budget);
}

TEST_F(DeviceErrors, OtherMisuseOfOneRank) {
  World world = std::move(World::in_process(1)[0]);
  Batch batch(world);
  const DispatchOptions options{.stream = batch.stream()};
  Exchange exchange(world, batch.options());
  expect_usage_error("register one with Exchange::add", [&] { exchange.dispatch(batch.input(), options); });
  exchange.add(batch.placement());
  const Received received = exchange.dispatch(batch.input(), options);
  expect_usage_error("expert_rows = true", [&] { exchange.expert_rows(received.handle(), Dtype::float32, 64, options.stream); });
  Pending<Combined> pending = exchange.start_combine(received.rows(), received.handle(), {.stream = options.stream});
  EXPECT_NO_THROW(pending.finish());
  EXPECT_THROW(pending.finish(), UsageError);
  EXPECT_NO_THROW(exchange.check());
}

TEST_F(DeviceErrors, HundredsOfExchangesLeaveNothingBehind) {
  constexpr int kCycles = 500;
  run_ranks(kRanks, [](World& world) {
    Batch batch(world);
    const auto cycle = [&](int count) {
      for (int i = 0; i < count; ++i) {
        Exchange exchange(world, batch.options());
        exchange.add(batch.placement());
        const DispatchOptions options{.layout = Layout::expert_major, .sizing = Sizing::capacity, .stream = batch.stream()};
        const Received received = exchange.dispatch(batch.input(), options);
        exchange.combine(received.rows(), received.handle(), {.stream = batch.stream()});
        cuda_check(cudaStreamSynchronize(batch.stream()), "cudaStreamSynchronize");
        exchange.check();
      }
    };
    cycle(10);
    free_on_all_gpus();  // see there
    world.barrier();
    const std::size_t descriptors = open_descriptors();
    const std::size_t free = free_on_all_gpus();
    world.barrier();
    cycle(kCycles);
    world.barrier();
    EXPECT_LT(open_descriptors(), descriptors + 20);
    EXPECT_GT(free_on_all_gpus() + (std::size_t{16} << 20), free);  // less than 32 KiB of a cycle
    world.barrier();
  });
}

}  // namespace
}  // namespace tokenyard::device_test
