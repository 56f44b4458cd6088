// Streams: calls on any of them, callers that are not held up, other kernels and other exchanges on the GPU, and leases. Gates hold
// what is to be late; a peer that has not called yet holds the exchange.

#include <gtest/gtest.h>

#include "device/gate.h"
#include "device/gpus.h"
#include "device/twin.h"
#include "memory/cuda_stream.h"
#include "multirank/exchange_rejection.h"
#include "multirank/world_failures.h"

namespace tokenyard::device_test {
namespace {

using exchange_test::expect_rejection;
using world_test::comes_true;

constexpr int kTooEarlyMs = 200;  // what does not wait for its turn happens within this time

using Stream = std::shared_ptr<CUstream_st>;

void synchronize(cudaStream_t stream) { cuda_check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }

// Whether all that is on `stream` now has run.
std::function<bool()> reached(cudaStream_t stream) {
  auto event = std::make_shared<CudaEvent>(value_or_throw(make_cuda_event()));
  cuda_check(cudaEventRecord(event->get(), stream), "cudaEventRecord");
  return [event] { return cudaEventQuery(event->get()) == cudaSuccess; };
}

DispatchOptions token_major(cudaStream_t stream, bool copy_out = false) {
  return {.sizing = Sizing::capacity, .copy_out = copy_out, .stream = stream};
}
DispatchOptions options_of(Mode mode, cudaStream_t stream) {
  DispatchOptions options = token_major(stream);
  options.mode = mode;
  if (mode == Mode::latency) options.layout = Layout::rank_slots;
  return options;
}

class ExchangeStreams : public OnGpu {};

// Nothing in between waits on the host: the exchange alone keeps its calls in order.
TEST_F(ExchangeStreams, CallsTakeAnyStream) {
  for (const int ranks : {2, 4}) {
    run_ranks(ranks, [](World& world) {
      constexpr int kCalls = 8;
      Twin twin(world, [](ExchangeOptions& options) { options.depth = kCalls; });
      std::vector<Stream> streams;
      for (int i = 0; i < 3; ++i) streams.push_back(value_or_throw(borrow_cuda_stream()));
      const CudaEvent event = value_or_throw(make_cuda_event());
      for (int round = 0; round < 3; ++round) {
        twin.batch.draw(round);
        std::vector<RoundTrip> trips(kCalls);
        for (int call = 0; call < kCalls; ++call) {
          const cudaStream_t first = streams[call % 3].get(), second = streams[(call + 1) % 3].get();
          const DispatchOptions options = options_of(call % 4 < 2 ? Mode::throughput : Mode::latency, first);
          RoundTrip& trip = trips[call];
          const bool phases = call % 2 == 1;
          const DispatchInput input = twin.batch.input();
          trip.received = phases ? twin.device.start_dispatch(input, options).finish() : twin.device.dispatch(input, options);
          order_streams(first, second, event);  // rows are valid in the order of the stream of their dispatch
          const CombineOptions combine{.stream = second};
          trip.combined = phases ? twin.device.start_combine(trip.received.rows(), trip.received.handle(), combine).finish()
                                 : twin.device.combine(trip.received.rows(), trip.received.handle(), combine);
        }
        for (const Stream& stream : streams) synchronize(stream.get());
        const RoundTrip by_mode[] = {twin.expected(options_of(Mode::throughput, nullptr)),
                                     twin.expected(options_of(Mode::latency, nullptr))};
        for (int call = 0; call < kCalls; ++call) {
          twin.expect_same(trips[call], by_mode[call % 4 < 2 ? 0 : 1], "round " + std::to_string(round) + ", call " + std::to_string(call));
        }
      }
      twin.device.check();
    });
  }
}

class ExchangeBeside : public OnGpu, public testing::WithParamInterface<Mode> {};

// While rank `late` has not called, the operation of the others cannot end, but their streams go on.
template <class Result>
Result start_before(World& world, Twin& twin, int late, cudaStream_t beside, const std::function<Pending<Result>()>& start) {
  if (world.rank() == late) world.barrier();
  Pending<Result> pending = start();
  if (world.rank() != late) {
    launch_fill(1'000'000, beside);
    cuda_check(cudaGetLastError(), "launching a kernel beside the exchange");
    synchronize(beside);
    EXPECT_FALSE(pending.ready()) << "the exchange ended without rank " << late;
    world.barrier();
  }
  Result result = pending.finish();
  synchronize(twin.batch.stream());
  twin.device.check();
  return result;
}

void expect_free_streams(World& world, Mode mode, bool other_stream) {
  Twin twin(world);
  const Stream other = value_or_throw(borrow_cuda_stream());
  const cudaStream_t beside = other_stream ? other.get() : twin.batch.stream();
  const DispatchOptions options = options_of(mode, twin.batch.stream());
  twin.expect_same(twin.device.start_dispatch(twin.batch.input(), options).finish(), twin.expected(options).received, "before");
  for (const int late : {0, 1}) {
    twin.batch.draw(late + 1);
    RoundTrip trip;
    trip.received =
        start_before<Received>(world, twin, late, beside, [&] { return twin.device.start_dispatch(twin.batch.input(), options); });
    trip.combined = start_before<Combined>(world, twin, late, beside, [&] {
      return twin.device.start_combine(trip.received.rows(), trip.received.handle(), {.stream = options.stream});
    });
    twin.expect_same(trip, twin.expected(options), "rank " + std::to_string(late) + " was late");
  }
}

TEST_P(ExchangeBeside, StartLeavesTheCallersStreamFree) {
  run_ranks(2, [](World& world) { expect_free_streams(world, GetParam(), false); });
}

TEST_P(ExchangeBeside, AKernelThatFillsTheGpuEndsWhileTheExchangeWaits) {
  run_ranks(2, [](World& world) { expect_free_streams(world, GetParam(), true); });
}

TEST_P(ExchangeBeside, CallsWaitForAKernelThatFillsTheGpu) {
  run_ranks(2, [](World& world) {
    Twin twin(world);
    const Stream compute = value_or_throw(borrow_cuda_stream());
    const DispatchOptions options = options_of(GetParam(), twin.batch.stream());
    for (unsigned round = 0; round < 3; ++round) {
      twin.batch.draw(round);
      launch_fill(world.rank() == 0 ? 60'000'000 : 20'000'000, compute.get());  // ranks get their multiprocessors at different times
      cuda_check(cudaGetLastError(), "launching a kernel beside the exchange");
      RoundTrip trip;
      trip.received = twin.device.dispatch(twin.batch.input(), options);
      trip.combined = twin.device.combine(trip.received.rows(), trip.received.handle(), {.stream = options.stream});
      twin.expect_same(trip, twin.expected(options), "round " + std::to_string(round));
    }
    twin.device.check();
  });
}

// Two exchanges on every GPU, whose calls the ranks make in opposite order: all kernels have room at once.
TEST_P(ExchangeBeside, TwoExchangesInOppositeOrder) {
  run_ranks(2, [](World& world) {
    const auto halve = [](ExchangeOptions& options) { options.sm_budget = std::max(1, options.sm_budget / 2); };
    Twin twin(world, halve);
    ExchangeOptions options = twin.batch.options();
    halve(options);
    Exchange second(world, options);
    second.add(twin.batch.placement());
    const Stream streams[] = {value_or_throw(borrow_cuda_stream()), value_or_throw(borrow_cuda_stream())};
    Exchange* const exchanges[] = {&twin.device, &second};
    for (unsigned round = 0; round < 6; ++round) {
      twin.batch.draw(round);
      // The first round allocates, which may wait for kernels: it is the same on both.
      const int first = round == 0 ? 0 : static_cast<int>(round + world.rank()) % 2;
      RoundTrip trips[2];
      Pending<Received> dispatches[2];
      Pending<Combined> combines[2];
      for (const int i : {first, 1 - first}) {
        dispatches[i] = exchanges[i]->start_dispatch(twin.batch.input(), options_of(GetParam(), streams[i].get()));
      }
      for (const int i : {first, 1 - first}) trips[i].received = dispatches[i].finish();
      for (const int i : {1 - first, first}) {
        combines[i] = exchanges[i]->start_combine(trips[i].received.rows(), trips[i].received.handle(), {.stream = streams[i].get()});
      }
      for (const int i : {first, 1 - first}) trips[i].combined = combines[i].finish();
      for (const Stream& stream : streams) synchronize(stream.get());
      for (Exchange* const exchange : exchanges) exchange->check();
      const RoundTrip expected = twin.expected(options_of(GetParam(), nullptr));
      for (const RoundTrip& trip : trips) twin.expect_same(trip, expected, "round " + std::to_string(round));
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Modes, ExchangeBeside, testing::Values(Mode::throughput, Mode::latency),
                         [](const auto& info) { return std::string(name(info.param)); });

// ---- leases ----

// Who reads the rows of a lease that is given back, and who makes the next dispatch, which gets the same buffer.
struct Reader {
  const char* name;
  bool reads_elsewhere = false;   // not on the stream of the dispatch, but on one that release() is told
  bool called_elsewhere = false;  // the next dispatch is on another stream
  bool phases = false;
};

class ExchangeLease : public OnGpu, public testing::WithParamInterface<Reader> {};

TEST_P(ExchangeLease, IsReadToTheEndBeforeItsBufferIsUsedAgain) {
  run_ranks(2, [](World& world) {
    const Reader& who = GetParam();
    Twin twin(world, [](ExchangeOptions& options) { options.depth = 1; });
    Gate gate;
    const cudaStream_t stream = twin.batch.stream();
    const Stream second = value_or_throw(borrow_cuda_stream()), third = value_or_throw(borrow_cuda_stream());
    const cudaStream_t reader = who.reads_elsewhere ? second.get() : stream;
    const cudaStream_t caller = who.called_elsewhere ? third.get() : stream;
    Received received = twin.device.dispatch(twin.batch.input(), token_major(stream));
    const Received expected = twin.expected(token_major(stream)).received;
    TensorView copy = received.rows();
    const std::size_t bytes = copy.num_elements() * sizeof(float);
    copy.data = twin.batch.reserve(bytes);
    DispatchInput zeros = twin.batch.input();
    zeros.rows.data = twin.batch.reserve(zeros.rows.num_elements() * sizeof(float));
    synchronize(stream);
    gate.close_on(reader);
    cuda_check(cudaMemcpyAsync(copy.data, received.rows().data, bytes, cudaMemcpyDeviceToDevice, reader), "reading a lease");
    received.release(who.reads_elsewhere ? reader : nullptr);
    Received next;
    Pending<Received> pending;
    if (who.phases)
      pending = twin.device.start_dispatch(zeros, token_major(caller));
    else
      next = twin.device.dispatch(zeros, token_major(caller));
    const std::function<bool()> done = who.phases ? [&] { return pending.ready(); } : reached(caller);
    EXPECT_FALSE(comes_true(kTooEarlyMs, done)) << "the buffer was used again while it was read";
    gate.open();
    if (who.phases) next = pending.finish();
    for (const cudaStream_t used : {reader, caller}) synchronize(used);
    twin.expect_same_rows(copy, expected, "what was read");
    twin.device.check();
  });
}

const Reader kReaders[] = {
    {.name = "OnItsStream", .phases = true},
    {.name = "OnAnotherStream", .reads_elsewhere = true},
    {.name = "OnAnotherStreamBeforePhases", .reads_elsewhere = true, .phases = true},
    {.name = "OnItsStreamBeforeACallElsewhere", .called_elsewhere = true},
    {.name = "OnAnotherStreamBeforeACallElsewhere", .reads_elsewhere = true, .called_elsewhere = true},
    {.name = "OnItsStreamBeforePhasesElsewhere", .called_elsewhere = true, .phases = true},
};
INSTANTIATE_TEST_SUITE_P(Readers, ExchangeLease, testing::ValuesIn(kReaders), [](const auto& info) { return info.param.name; });

// Streams come from pools: what was one rank's is another's once the first is done with it. By then nothing waits for it any more.
TEST_F(ExchangeStreams, RanksTakeOverEachOthersStreams) {
  const int gpus = gpu_count(), ranks = 2 * gpus;  // rank r and r + gpus are on one GPU
  for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
    std::vector<Stream> streams(ranks);
    run_ranks(ranks, [&](World& world) {
      Twin twin(world, [](ExchangeOptions& options) { options.depth = 1; });
      streams[world.rank()] = value_or_throw(borrow_cuda_stream());
      world.barrier();
      DispatchOptions options = token_major(nullptr);
      options.layout = layout;
      const Received expected = twin.expected(options).received;
      const bool is_late = world.rank() < gpus;
      for (int round = 0; round < 4; ++round) {
        options.stream = streams[(world.rank() + round * gpus) % ranks].get();
        if (is_late) world.barrier();  // others' kernels, which wait for this rank, are on the stream that was this rank's
        {
          const Received received = twin.device.dispatch(twin.batch.input(), options);
          if (!is_late) world.barrier();
          synchronize(static_cast<cudaStream_t>(options.stream));
          twin.device.check();
          twin.expect_same(received, expected, "round " + std::to_string(round));
        }
        world.barrier();
      }
    });
  }
}

// The sums of a combine are memory of the exchange, too: whoever gets it next, on another stream, waits for what reads it here.
TEST_F(ExchangeStreams, SumsAreReadToTheEndBeforeTheirMemoryIsUsedAgain) {
  for (const bool phases : {false, true}) {
    run_ranks(2, [&](World& world) {
      Twin twin(world);
      Gate gate;
      const cudaStream_t stream = twin.batch.stream();
      const Stream other = value_or_throw(borrow_cuda_stream());
      const Received received = twin.device.dispatch(twin.batch.input(), token_major(stream));
      const RoundTrip expected = twin.expected(token_major(stream));
      const TensorView zeros(twin.batch.reserve(received.rows().num_elements() * sizeof(float)), Dtype::float32,
                             {received.rows().shape[0], received.rows().shape[1]});
      Combined sums = phases ? twin.device.start_combine(received.rows(), received.handle(), {.stream = stream}).finish()
                             : twin.device.combine(received.rows(), received.handle(), {.stream = stream});
      Combined copy = sums;
      copy.memory = nullptr;
      copy.out.data = twin.batch.reserve(sums.out.num_elements() * sizeof(float));
      synchronize(stream);
      gate.close_on(stream);
      cuda_check(cudaMemcpyAsync(copy.out.data, sums.out.data, sums.out.num_elements() * sizeof(float), cudaMemcpyDeviceToDevice, stream),
                 "reading sums");
      const void* const used = sums.out.data;
      sums = {};
      const Combined next = twin.device.combine(zeros, received.handle(), {.stream = other.get()});
      ASSERT_EQ(next.out.data, used);
      EXPECT_FALSE(comes_true(kTooEarlyMs, reached(other.get()))) << "memory was used again while it was read";
      gate.open();
      for (const cudaStream_t used_by : {stream, other.get()}) synchronize(used_by);
      twin.expect_same({.received = received, .combined = copy}, expected, "what was read");
      twin.device.check();
    });
  }
}

TEST_F(ExchangeStreams, ExhaustedLeasesNameTheirHolders) {
  constexpr int kCulprit = 1;
  for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
    run_ranks(3, [&](World& world) {
      Twin twin(world);
      const DispatchOptions options{.layout = layout, .stream = twin.batch.stream()};
      Received first = twin.device.dispatch(twin.batch.input(), options);
      Received second = twin.device.dispatch(twin.batch.input(), options);
      if (world.rank() != kCulprit) second.release();
      const auto again = [&] { twin.device.dispatch(twin.batch.input(), options); };
      expect_rejection(world, kCulprit, "call 1", again, again);
      expect_rejection(world, kCulprit, "release a Received", again, again);
      first.release();
      EXPECT_NO_THROW(again());
    });
  }
}

// Copies are no leases: any number of them lives at once.
TEST_F(ExchangeStreams, CopiesOutliveTheBuffersTheyCameFrom) {
  run_ranks(2, [](World& world) {
    Twin twin(world, [](ExchangeOptions& options) { options.depth = 1; });
    const std::int64_t rows =
        twin.device.options().receive_rows == 0 ? 2 * twin.batch.shape().max_tokens : twin.device.options().receive_rows;
    const std::int64_t columns = twin.batch.shape().hidden_size;
    const TensorView mine(twin.batch.reserve(rows * columns * sizeof(float)), Dtype::float32, {rows, columns});
    std::vector<Received> copies, expected;
    for (unsigned i = 0; i < 5; ++i) {
      twin.batch.draw(i);
      DispatchOptions options = token_major(twin.batch.stream(), true);
      expected.push_back(twin.expected(options).received);
      if (i == 2) options.out_rows = mine;
      copies.push_back(twin.device.dispatch(twin.batch.input(), options));
    }
    EXPECT_EQ(copies[2].rows().data, mine.data);
    for (std::size_t i = 0; i < copies.size(); ++i) twin.expect_same(copies[i], expected[i], "copy " + std::to_string(i));
  });
}

// What finish() leaves to do on the caller's stream reads the buffer that the next dispatch, on another stream, may get.
TEST_F(ExchangeStreams, ACopyOnTheCallersStreamEndsBeforeItsBufferIsUsedAgain) {
  run_ranks(2, [](World& world) {
    Twin twin(world, [](ExchangeOptions& options) { options.depth = 1; });
    Gate gate;
    const cudaStream_t stream = twin.batch.stream();
    const Stream other = value_or_throw(borrow_cuda_stream());
    DispatchInput zeros = twin.batch.input();
    zeros.rows.data = twin.batch.reserve(zeros.rows.num_elements() * sizeof(float));
    {
      const Received one = twin.device.dispatch(twin.batch.input(), token_major(stream, true));  // two at once, as below: later
      const Received two = twin.device.dispatch(twin.batch.input(), token_major(stream, true));  // calls allocate nothing
    }
    const Received expected = twin.expected(token_major(stream)).received;
    Pending<Received> first = twin.device.start_dispatch(twin.batch.input(), token_major(stream, true));
    ASSERT_TRUE(comes_true(4'000, [&] { return first.ready(); }));
    gate.close_on(stream);
    const Received received = first.finish();
    Pending<Received> second = twin.device.start_dispatch(zeros, token_major(other.get(), true));
    EXPECT_FALSE(comes_true(kTooEarlyMs, [&] { return second.ready(); })) << "rows came to a buffer that was still read";
    gate.open();
    const Received next = second.finish();
    synchronize(other.get());
    twin.expect_same_rows(received.rows(), expected, "the first copy");
  });
}

TEST_F(ExchangeStreams, ACallBehindACaptureWaitsForTheOneBeforeIt) {
  run_ranks(2, [](World& world) {
    Twin twin(world, [](ExchangeOptions& options) { options.depth = 4; });
    Gate gate;
    const cudaStream_t stream = twin.batch.stream();
    const Stream capturing = value_or_throw(borrow_cuda_stream()), other = value_or_throw(borrow_cuda_stream());
    const auto dispatch = [&](cudaStream_t on) { return twin.device.dispatch(twin.batch.input(), token_major(on)); };
    { const Received warm[] = {dispatch(stream), dispatch(stream), dispatch(stream)}; }
    const Received expected = twin.expected(token_major(stream)).received;
    synchronize(stream);
    gate.close_on(stream);
    const Received before = dispatch(stream);
    cuda_check(cudaStreamBeginCapture(capturing.get(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    const Received captured = dispatch(capturing.get());
    cudaGraph_t graph = nullptr;
    cuda_check(cudaStreamEndCapture(capturing.get(), &graph), "cudaStreamEndCapture");
    const CudaHandle<cudaGraph_t, cudaGraphDestroy> owner(graph);
    const Received behind = dispatch(other.get());
    EXPECT_FALSE(comes_true(kTooEarlyMs, reached(other.get()))) << "a call overtook another one of its exchange";
    gate.open();
    synchronize(other.get());
    twin.expect_same(before, expected, "before the capture");
    twin.expect_same(behind, expected, "behind it");
    twin.device.check();
  });
}

}  // namespace
}  // namespace tokenyard::device_test
