// What callers can get wrong: the rank that does gets a UsageError with the value, its peers fail the same call with that reason, and
// the next call works on all of them.

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "multirank/exchange_rejection.h"
#include "multirank/exchange_small.h"

namespace tokenyard::exchange_test {
namespace {

constexpr int kRanks = 3;
constexpr int kCulprit = 1;

using Tokens = SmallTokens<float>;

void expect_rejection(World& world, const std::string& text, const std::function<void()>& good, const std::function<void()>& bad) {
  exchange_test::expect_rejection(world, kCulprit, text, good, bad);
}

using In = DispatchInput;
using Op = DispatchOptions;
constexpr Dtype kF32 = Dtype::float32;

struct BadDispatch {
  std::string text;  // what the error must say
  std::function<void(DispatchInput&, DispatchOptions&)> spoil;
};

const float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<BadDispatch> bad_rows() {
  static std::vector<float> other(1024, 1.0F);
  return {
      {"[3, 8] float32", [=](In& in, Op&) { in.rows.shape[0] = 3; }},
      {"[32] float32",
       [=](In& in, Op&) {
         in.rows = {other.data(), kF32, {32}};
       }},
      {"strides [16, 2]",
       [=](In& in, Op&) {
         in.rows = {other.data(), kF32, {4, 8}}, in.rows.strides = {16, 2};
       }},
      {"20 bytes",
       [=](In& in, Op&) {
         in.rows = {other.data(), kF32, {4, 5}};
       }},
      {"128 bytes",
       [=](In& in, Op&) {
         in.rows = {other.data(), kF32, {4, 32}};
       }},
      {"0 bytes",
       [=](In& in, Op&) {
         in.rows = {other.data(), kF32, {4, 0}};
       }},
      {"data is null", [=](In& in, Op&) { in.rows.data = nullptr; }},
  };
}

std::vector<BadDispatch> bad_routing_and_scales() {
  static std::vector<float> other(1024, 1.0F);
  static std::vector<float> nan_weights = {1, 1, 1, 1, 1, kNan, 1, 1};
  static std::vector<std::int64_t> high_id = {0, 1, 4, 1, 0, 1, 0, 1};
  static std::vector<std::int32_t> ids32(64, 1);
  return {
      {"[4, 2] float32; expected int64 or int32",
       [=](In& in, Op&) {
         in.topk_ids = {other.data(), kF32, {4, 2}};
       }},
      {"top_k = 3",
       [=](In& in, Op&) {
         in.topk_ids = {ids32.data(), Dtype::int32, {4, 3}};
       }},
      {"top_k = 0",
       [=](In& in, Op&) {
         in.topk_ids = {ids32.data(), Dtype::int32, {4, 0}};
       }},
      {"[2, 2, 2] int32",
       [=](In& in, Op&) {
         in.topk_ids = {ids32.data(), Dtype::int32, {2, 2, 2}};
       }},
      {"topk_ids", [=](In& in, Op&) { in.topk_ids = {}; }},
      {"has 5 tokens",
       [=](In& in, Op&) {
         in.rows = {other.data(), kF32, {5, 8}}, in.topk_ids = {ids32.data(), Dtype::int32, {5, 2}}, in.topk_weights = {};
       }},
      {"topk_ids[1, 0] = 4", [=](In& in, Op&) { in.topk_ids.data = high_id.data(); }},
      {"topk_weights is [4, 1]",
       [=](In& in, Op&) {
         in.topk_weights = {other.data(), kF32, {4, 1}};
       }},
      {"float64", [=](In& in, Op&) { in.topk_weights.dtype = Dtype::float64; }},
      {"topk_weights[2, 1] = nan", [=](In& in, Op&) { in.topk_weights.data = nan_weights.data(); }},
      {"scales is [3, 2]",
       [=](In& in, Op&) {
         in.scales = {other.data(), kF32, {3, 2}};
       }},
      {"scales are 20 bytes",
       [=](In& in, Op&) {
         in.scales = {other.data(), kF32, {4, 5}};
       }},
      {"float64",
       [=](In& in, Op& op) {
         in.rows = {other.data(), Dtype::float64, {4, 8}}, op.quantise = ScaleFormat::float32;
       }},
      {"scales is [4, 2]",
       [=](In& in, Op& op) {
         in.scales = {other.data(), kF32, {4, 2}}, in.rows = {other.data(), kF32, {4, 16}}, op.quantise = ScaleFormat::float32;
       }},
  };
}

std::vector<BadDispatch> bad_options() {
  static std::vector<float> out(64);
  return {
      {"sizing = exact with mode = latency", [](In&, Op& op) { op.mode = Mode::latency; }},
      {"rank_slots needs mode = latency", [](In&, Op& op) { op.layout = Layout::rank_slots; }},
      {"alignment = 3", [](In&, Op& op) { op.layout = Layout::expert_major, op.alignment = 3; }},
      {"alignment = 512", [](In&, Op& op) { op.layout = Layout::expert_major, op.alignment = 512; }},
      {"alignment = 0", [](In&, Op& op) { op.layout = Layout::expert_major, op.alignment = 0; }},
      {"alignment = 8 with layout = token_major", [](In&, Op& op) { op.alignment = 8; }},
      {"gather_map with layout = expert_major", [](In&, Op& op) { op.layout = Layout::expert_major, op.gather_map = true; }},
      {"expert_capacity = -1", [](In&, Op& op) { op.layout = Layout::expert_major, op.expert_capacity = -1; }},
      {"expert_capacity = 4 with layout = token_major", [](In&, Op& op) { op.expert_capacity = 4; }},
      {"drop without expert_capacity", [](In&, Op& op) { op.layout = Layout::expert_major, op.drop = true; }},
      {"placement = 7", [](In&, Op& op) { op.placement = 7; }},
      {"placement = -1", [](In&, Op& op) { op.placement = -1; }},
      {"copy_out is false",
       [=](In&, Op& op) {
         op.out_rows = {out.data(), kF32, {4, 8}};
       }},
      {"out_rows is [4, 4] float32",
       [=](In&, Op& op) {
         op.copy_out = true, op.out_rows = {out.data(), kF32, {4, 4}};
       }},
      {"out_rows is [4, 8] float16",
       [=](In&, Op& op) {
         op.copy_out = true, op.out_rows = {out.data(), Dtype::float16, {4, 8}};
       }},
  };
}

std::vector<std::pair<std::string, TensorView>> bad_waits() {
  static std::vector<std::int64_t> memory(8);
  const auto tensor = [](std::initializer_list<std::int64_t> shape, Dtype dtype = Dtype::int64) {
    return TensorView(memory.data(), dtype, shape);
  };
  TensorView strided = tensor({kRanks});
  strided.strides[0] = 2;
  return {{"waits is [2] int64; expected [3] int64, a number for each rank", tensor({2})},
          {"waits is [3, 1] int64; expected [3] int64", tensor({kRanks, 1})},
          {"waits is [3] int32; expected [3] int64", tensor({kRanks}, Dtype::int32)},
          {"waits is [3] int64 with strides [2]; expected a dense tensor", strided},
          {"waits is [3] int64 but its data is null", TensorView(nullptr, Dtype::int64, {kRanks})}};
}

// All of them on one exchange, one after the other.
TEST(ExchangeErrors, DispatchRejectsAndPeersLearnWhy) {
  run_ranks(kRanks, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(kRanks));
    const Tokens tokens(world.rank(), 1);
    std::vector<BadDispatch> all = bad_rows();
    for (auto* more : {bad_routing_and_scales, bad_options}) {
      for (BadDispatch& bad : more()) all.push_back(std::move(bad));
    }
    for (const auto& [text, waits] : bad_waits()) all.push_back({text, [waits = waits](In&, Op& op) { op.waits = waits; }});
    for (const BadDispatch& bad : all) {
      DispatchInput input = tokens.input();
      DispatchOptions options;
      const std::function<void()> good = [&] { exchange.dispatch(tokens.input()); };
      bad.spoil(input, options);
      expect_rejection(world, bad.text, good, [&] { exchange.dispatch(input, options); });
      ASSERT_NO_THROW(good()) << "after " << bad.text;
      expect_rejection(world, bad.text, good, [&] { exchange.start_dispatch(input, options); });
    }
  });
}

struct BadCombine {
  std::string text;
  std::function<void(ConstTensorView&, CombineOptions&)> spoil;
  Layout layout = Layout::expert_major;
};

std::vector<BadCombine> bad_combines() {
  static std::vector<double> other(1024, 1.0);
  using Y = ConstTensorView;
  using Op = CombineOptions;
  const auto kF32 = Dtype::float32;
  const auto tensor = [=](std::initializer_list<std::int64_t> shape, Dtype dtype = Dtype::float32) {
    return TensorView(other.data(), dtype, shape);
  };
  return {
      {"y is [1, 8] float32",
       [=](Y& y, Op&) {
         y = tensor({1, 8});
       }},
      {"y is", [=](Y& y, Op&) { y.ndim = 1; }},
      {"int32", [=](Y& y, Op&) { y.dtype = Dtype::int32; }},
      {"12 bytes", [=](Y& y, Op&) { y.shape[1] = 3; }},
      {"0 bytes", [=](Y& y, Op&) { y.shape[1] = 0; }},
      {"128 bytes", [=](Y& y, Op&) { y.shape[1] = 16, y.dtype = Dtype::float64; }},
      {"weighting = at_expert with layout = token_major", [=](Y&, Op& op) { op.weighting = Weighting::at_expert; }, Layout::token_major},
      {"weighting = at_source with layout = token_major",
       [=](Y&, Op& op) {
         op.weighting = Weighting::at_source, op.source_weights = tensor({4, 2});
       },
       Layout::token_major},
      {"source_weights with weighting = none",
       [=](Y&, Op& op) {
         op.source_weights = tensor({4, 2});
       }},
      {"source_weights is", [=](Y&, Op& op) { op.weighting = Weighting::at_source; }},
      {"source_weights is [4, 1]",
       [=](Y&, Op& op) {
         op.weighting = Weighting::at_source, op.source_weights = tensor({4, 1});
       }},
      {"row_weights is [2] float32", [=](Y&, Op& op) { op.row_weights = tensor({2}); }},
      {"row_weights is", [=](Y&, Op& op) { op.row_weights = tensor({1000}, Dtype::float64); }},
      {"bias0 is [3, 8]",
       [=](Y&, Op& op) {
         op.bias0 = tensor({3, 8});
       }},
      {"bias1 is [4, 7]",
       [=](Y&, Op& op) {
         op.bias1 = tensor({4, 7});
       }},
      {"bfloat16",
       [=](Y&, Op& op) {
         op.bias0 = tensor({4, 8}, Dtype::bfloat16);
       }},
      {"out is [5, 8]",
       [=](Y&, Op& op) {
         op.out = tensor({5, 8});
       }},
      {"out is [4, 8] int32",
       [=](Y&, Op& op) {
         op.out = tensor({4, 8}, Dtype::int32);
       }},
      {"fold = false with layout = token_major", [=](Y&, Op& op) { op.fold = false; }, Layout::token_major},
      {"unfolded = true", [=](Y&, Op& op) { op.fold = false; }},
      {"data is null",
       [=](Y& y, Op&) {
         y = ConstTensorView(nullptr, kF32, {y.shape[0], y.shape[1]});
       }},
  };
}

TEST(ExchangeErrors, CombineRejectsAndPeersLearnWhy) {
  run_ranks(kRanks, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(kRanks));
    const Tokens tokens(world.rank(), 1);
    std::vector<BadCombine> all = bad_combines();
    for (const auto& [text, waits] : bad_waits())
      all.push_back({text, [waits = waits](ConstTensorView&, CombineOptions& op) { op.waits = waits; }});
    for (const BadCombine& bad : all) {
      const Received received = exchange.dispatch(tokens.input(), {.layout = bad.layout});
      const Handle handle = received.handle();
      const std::function<void()> good = [&] { exchange.combine(received.rows(), handle); };
      ConstTensorView y = received.rows();
      CombineOptions options;
      bad.spoil(y, options);
      expect_rejection(world, bad.text, good, [&] { exchange.combine(y, handle, options); });
      ASSERT_NO_THROW(good()) << "after " << bad.text;
      expect_rejection(world, bad.text, good, [&] { exchange.start_combine(y, handle, options); });
    }
  });
}

TEST(ExchangeErrors, HandlesThatDoNotFit) {
  run_ranks(kRanks, [](World& world) {
    Exchange exchange(world, small_options());
    Exchange other(world, small_options());
    exchange.add(small_placement(kRanks));
    other.add(small_placement(kRanks));
    const Tokens tokens(world.rank(), 1);
    const Received received = exchange.dispatch(tokens.input());
    const Handle foreign = other.dispatch(tokens.input()).handle();
    Handle gone = received.handle();
    const Handle kept = std::move(gone);
    const std::function<void()> good = [&] { exchange.combine(received.rows(), kept); };
    const std::function<void()> good_dispatch = [&] { exchange.dispatch(tokens.rows_only(), kept); };
    expect_rejection(world, "the handle is empty", good, [&] { exchange.combine(received.rows(), gone); });
    expect_rejection(world, "the handle is empty", good, [&] { exchange.combine(received.rows(), Handle()); });
    expect_rejection(world, "belongs to another exchange", good, [&] { exchange.combine(received.rows(), foreign); });
    expect_rejection(world, "belongs to another exchange", good_dispatch, [&] { exchange.dispatch(tokens.rows_only(), foreign); });
    expect_rejection(world, "topk_ids or topk_weights with a handle", good_dispatch, [&] { exchange.dispatch(tokens.input(), kept); });
    const Tokens fewer(world.rank(), 1, 3);
    expect_rejection(world, "[3, 8] float32", good_dispatch, [&] { exchange.dispatch(fewer.rows_only(), kept); });
    good();
    good_dispatch();
  });
}

// Ranks that reuse handles of different dispatches made different calls, though everything else is equal.
TEST(ExchangeErrors, AHandleOfAnotherCallIsAMismatch) {
  run_ranks(2, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(2));
    const Tokens tokens(world.rank(), 1);
    const Handle first = exchange.dispatch(tokens.input()).handle();
    const Handle second = exchange.dispatch(tokens.input()).handle();
    try {
      exchange.dispatch(tokens.rows_only(), world.rank() == 0 ? first : second);
      ADD_FAILURE() << "no error";
    } catch (const TransportError& error) {
      EXPECT_EQ(error.failure().kind, FailureKind::mismatch) << error.what();
      EXPECT_NE(error.failure().detail.find("handle of call 1"), std::string::npos) << error.what();
      EXPECT_NE(error.failure().detail.find("handle of call 2"), std::string::npos) << error.what();
    }
    exchange.clear();
    EXPECT_NO_THROW(exchange.dispatch(tokens.rows_only(), first));
  });
}

TEST(ExchangeErrors, ExhaustedLeasesNameTheirHolders) {
  run_ranks(kRanks, [](World& world) {
    for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
      Exchange exchange(world, small_options());
      exchange.add(small_placement(kRanks));
      const Tokens tokens(world.rank(), 1);
      Received first = exchange.dispatch(tokens.input(), {.layout = layout});
      Received second = exchange.dispatch(tokens.input(), {.layout = layout});
      if (world.rank() != kCulprit) second.release();
      const auto again = [&] { exchange.dispatch(tokens.input(), {.layout = layout}); };
      expect_rejection(world, "call 1", again, again);
      expect_rejection(world, "release a Received", again, again);
      first.release();
      EXPECT_NO_THROW(again());
      Pending<Received> third = exchange.start_dispatch(tokens.input(), {.layout = layout});
      if (world.rank() == kCulprit) {
        EXPECT_THROW(exchange.start_dispatch(tokens.input(), {.layout = layout}), UsageError);  // promised to the third
      } else {
        Pending<Received> fourth = exchange.start_dispatch(tokens.input(), {.layout = layout});
        EXPECT_THROW(fourth.finish(), TransportError);
      }
      EXPECT_NO_THROW(third.finish());
    }
  });
}

TEST(ExchangeErrors, CallsInAnotherOrderAreAMismatchThatNamesBoth) {
  run_ranks(2, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(2));
    const Tokens tokens(world.rank(), 1);
    const Received received = exchange.dispatch(tokens.input());
    const auto dispatch = [&] { exchange.dispatch(tokens.input()); };
    const auto combine = [&] { exchange.combine(received.rows(), received.handle()); };
    for (const bool swapped : {false, true}) {
      try {
        if ((world.rank() == 0) != swapped)
          dispatch();
        else
          combine();
        ADD_FAILURE() << "no error";
      } catch (const TransportError& error) {
        EXPECT_EQ(error.failure().kind, FailureKind::mismatch) << error.what();
        EXPECT_NE(error.failure().detail.find("dispatch call"), std::string::npos) << error.what();
        EXPECT_NE(error.failure().detail.find("combine call"), std::string::npos) << error.what();
      }
      EXPECT_THROW(exchange.check(), TransportError);  // sticky
      EXPECT_THROW(dispatch(), TransportError);
      exchange.clear();
      EXPECT_NO_THROW(exchange.check());
      EXPECT_NO_THROW(combine());
    }
  });
}

struct Mismatch {
  std::string first, second;  // both values must be named
  std::function<void(DispatchInput&, DispatchOptions&, int rank)> change;
};

TEST(ExchangeErrors, DifferentDispatchesAreAMismatchThatNamesBoth) {
  static std::vector<float> other(1024, 1.0F);
  static std::vector<std::int64_t> ids(64, 1);
  using Op = DispatchOptions;
  const std::vector<Mismatch> mismatches = {
      {"token_major", "expert_major", [](In&, Op& op, int rank) { op.layout = rank == 0 ? Layout::token_major : Layout::expert_major; }},
      {"throughput", "latency",
       [](In&, Op& op, int rank) { op.sizing = Sizing::capacity, op.mode = rank == 0 ? Mode::throughput : Mode::latency; }},
      {"32-byte rows", "64-byte rows",
       [](In& in, Op&, int rank) {
         in.rows = {other.data(), Dtype::float32, {4, rank == 0 ? 8 : 16}};
       }},
      {"top_k 1", "top_k 2",
       [](In& in, Op&, int rank) {
         in.topk_ids = {ids.data(), Dtype::int64, {4, rank == 0 ? 1 : 2}}, in.topk_weights = {};
       }},
      {"8-byte scales", "rank",
       [](In& in, Op&, int rank) {
         if (rank == 0) in.scales = {other.data(), Dtype::float32, {4, 2}};
       }},
      {"placement", "placement", [](In&, Op& op, int rank) { op.placement = rank; }},
  };
  run_ranks(2, [&](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(small_placement(2));
    exchange.add(Placement::uniform(kSmallExperts + 1, 2));
    const Tokens tokens(world.rank(), 1);
    for (const Mismatch& mismatch : mismatches) {
      DispatchInput input = tokens.input();
      DispatchOptions options;
      mismatch.change(input, options, world.rank());
      try {
        exchange.dispatch(input, options);
        ADD_FAILURE() << "no error for " << mismatch.first << " against " << mismatch.second;
      } catch (const TransportError& error) {
        EXPECT_EQ(error.failure().kind, FailureKind::mismatch) << error.what();
        EXPECT_NE(error.failure().detail.find(mismatch.first), std::string::npos) << error.what();
        EXPECT_NE(error.failure().detail.find(mismatch.second), std::string::npos) << error.what();
      }
      exchange.clear();
      ASSERT_NO_THROW(exchange.dispatch(tokens.input()));
    }
  });
}

TEST(ExchangeErrors, DifferentOptionsNameBothValues) {
  run_ranks(3, [](World& world) {
    ExchangeOptions options = small_options();
    if (world.rank() == 2) options.max_row_bytes = 48;
    try {
      const Exchange exchange(world, options);
      ADD_FAILURE() << "no error";
    } catch (const TransportError& error) {
      EXPECT_EQ(error.failure().kind, FailureKind::mismatch) << error.what();
      EXPECT_NE(error.failure().detail.find("max_row_bytes = 64"), std::string::npos) << error.what();
      EXPECT_NE(error.failure().detail.find("max_row_bytes = 48"), std::string::npos) << error.what();
    }
    options.max_row_bytes = 64;
    options.num_threads = 1 + world.rank();  // these may differ
    EXPECT_NO_THROW(Exchange(world, options));
  });
}

TEST(ExchangeErrors, DifferentPlacementsAreAMismatch) {
  run_ranks(2, [](World& world) {
    Exchange exchange(world, small_options());
    try {
      exchange.add(Placement::uniform(3 + world.rank(), 2));
      ADD_FAILURE() << "no error";
    } catch (const TransportError& error) {
      EXPECT_EQ(error.failure().kind, FailureKind::mismatch) << error.what();
    }
    EXPECT_EQ(exchange.add(small_placement(2)), 0);
  });
}

TEST(ExchangeErrors, OptionsOutOfRange) {
  struct Bad {
    std::string text;
    std::function<void(ExchangeOptions&)> spoil;
  };
  using O = ExchangeOptions;
  const std::vector<Bad> all = {
      {"max_tokens_per_rank = 0", [](O& o) { o.max_tokens_per_rank = 0; }},
      {"max_tokens_per_rank = -5", [](O& o) { o.max_tokens_per_rank = -5; }},
      {"max_row_bytes = 24", [](O& o) { o.max_row_bytes = 24; }},
      {"max_row_bytes = 0", [](O& o) { o.max_row_bytes = 0; }},
      {"max_scale_bytes = -1", [](O& o) { o.max_scale_bytes = -1; }},
      {"top_k = 65", [](O& o) { o.top_k = 65; }},
      {"top_k = 0", [](O& o) { o.top_k = 0; }},
      {"max_local_experts = 0", [](O& o) { o.max_local_experts = 0; }},
      {"max_fanout = 2", [](O& o) { o.max_fanout = 2; }},
      {"receive_rows = -1", [](O& o) { o.receive_rows = -1; }},
      {"receive_rows = 5", [](O& o) { o.receive_rows = 5; }},
      {"depth = 0", [](O& o) { o.depth = 0; }},
      {"depth = 17", [](O& o) { o.depth = 17; }},
      {"num_threads = 0", [](O& o) { o.num_threads = 0; }},
      {"timeout_ms = -1", [](O& o) { o.timeout_ms = -1; }},
      {"reduction_groups has 2 entries",
       [](O& o) {
         o.reduction_groups = {0, 0};
       }},
      {"reduction_groups names group 1", [](O& o) { o.reduction_groups = {1}; }},
      {"2147483647", [](O& o) { o.max_tokens_per_rank = std::int64_t{1} << 40; }},
      {"exceeds", [](O& o) { o.max_tokens_per_rank = 1 << 24, o.max_row_bytes = 1 << 30; }},
  };
  World world = std::move(World::in_process(1)[0]);
  for (const Bad& bad : all) {
    ExchangeOptions options = small_options();
    bad.spoil(options);
    for (const bool planned : {false, true}) {
      try {
        if (planned)
          (void)Exchange::memory_plan(options, 1);
        else
          (void)Exchange(world, options);
        ADD_FAILURE() << "no error for " << bad.text;
      } catch (const UsageError& error) {
        EXPECT_NE(std::string(error.what()).find(bad.text), std::string::npos) << error.what() << "\nexpected '" << bad.text << "'";
      }
    }
  }
}

TEST(ExchangeErrors, OtherMisuseOfOneRank) {
  World world = std::move(World::in_process(1)[0]);
  Exchange exchange(world, small_options());
  const Tokens tokens(0, 1);
  EXPECT_THROW(exchange.dispatch(tokens.input()), UsageError);  // no placement
  EXPECT_THROW(exchange.add(Placement::uniform(4, 2)), UsageError);
  EXPECT_THROW(exchange.add(Placement::uniform(kSmallExperts + 1, 1)), UsageError);  // max_local_experts
  exchange.add(small_placement(1));
  const Received received = exchange.dispatch(tokens.input());
  EXPECT_THROW(exchange.expert_rows(received.handle(), Dtype::float32, kSmallHidden), UsageError);
  EXPECT_THROW(Pending<Received>().finish(), UsageError);
  Pending<Combined> pending = exchange.start_combine(received.rows(), received.handle());
  EXPECT_NO_THROW(pending.finish());
  EXPECT_THROW(pending.finish(), UsageError);
  EXPECT_NO_THROW(exchange.combine(received.rows(), received.handle()));
}

// Rows of one rank against receive_rows: met exactly, then exceeded by one.
TEST(ExchangeErrors, OverflowByOneIsStickyEverywhereUntilCleared) {
  for (const Sizing sizing : {Sizing::exact, Sizing::capacity}) {
    run_ranks(3, [&](World& world) {
      ExchangeOptions options = small_options();
      options.receive_rows = 6;
      Exchange exchange(world, options);
      exchange.add(Placement::custom(3, std::vector<std::vector<Replica>>(kSmallExperts, {Replica{.shard_ranks = {2}}})));
      const Tokens two(world.rank(), 1, 2);
      const Tokens three(world.rank(), 1, world.rank() == 0 ? 3 : 2);
      const DispatchOptions dispatch{.sizing = sizing};
      for (int repeat = 0; repeat < 2; ++repeat) {
        EXPECT_EQ(exchange.dispatch(two.input(), dispatch).num_rows(), world.rank() == 2 ? 6 : 0);
        for (int again = 0; again < 2; ++again) {
          try {
            exchange.dispatch(again == 0 ? three.input() : two.input(), dispatch);
            ADD_FAILURE() << "no error";
          } catch (const TransportError& error) {
            EXPECT_EQ(error.failure().kind, FailureKind::overflow) << error.what();
            EXPECT_EQ(error.failure().peer, 2) << error.what();
            EXPECT_EQ(error.failure().expected, 6) << error.what();
            EXPECT_EQ(error.failure().seen, 7) << error.what();
          }
        }
        EXPECT_THROW(exchange.check(), TransportError);
        exchange.clear();
      }
      EXPECT_EQ(exchange.dispatch(two.input(), dispatch).num_rows(), world.rank() == 2 ? 6 : 0);
    });
  }
}

TEST(ExchangeErrors, AnExpertOverItsCapacityOverflowsEverywhere) {
  for (const Layout layout : {Layout::expert_major, Layout::expert_padded}) {
    run_ranks(2, [&](World& world) {
      Exchange exchange(world, small_options());
      exchange.add(small_placement(2));
      Tokens tokens(world.rank(), 1);
      for (std::int64_t t = 0; t < tokens.tokens; ++t) tokens.ids[t * 2] = 3, tokens.ids[t * 2 + 1] = -1;
      const DispatchOptions fits{.layout = layout, .expert_capacity = 8};
      const DispatchOptions exceeds{.layout = layout, .expert_capacity = 7};
      EXPECT_EQ(exchange.dispatch(tokens.input(), fits).handle().num_rows(), world.rank() == 1 ? 8 : 0);
      try {
        exchange.dispatch(tokens.input(), exceeds);
        ADD_FAILURE() << "no error";
      } catch (const TransportError& error) {
        EXPECT_EQ(error.failure().kind, FailureKind::overflow) << error.what();
        EXPECT_EQ(error.failure().peer, 1) << error.what();
        EXPECT_EQ(error.failure().expected, 7) << error.what();
        EXPECT_EQ(error.failure().seen, 8) << error.what();
      }
      exchange.clear();
      DispatchOptions drops = exceeds;
      drops.drop = true;
      const Received received = exchange.dispatch(tokens.input(), drops);
      EXPECT_EQ(received.handle().dropped()[1], world.rank() == 1 ? 1 : 0);
    });
  }
}

// Without validate an id beyond the experts counts as none, and nothing is rejected.
TEST(ExchangeErrors, WithoutValidateHighIdsAreNoExpert) {
  run_ranks(2, [](World& world) {
    ExchangeOptions options = small_options();
    options.validate = false;
    Exchange exchange(world, options);
    exchange.add(small_placement(2));
    Tokens tokens(world.rank(), 1);
    for (std::int64_t& id : tokens.ids) id = (std::int64_t{1} << 40) + id;
    const Received received = exchange.dispatch(tokens.input());
    EXPECT_EQ(received.num_rows(), 0);
    const Combined combined = exchange.combine(received.rows(), received.handle());
    for (std::int64_t i = 0; i < combined.out.num_elements(); ++i) EXPECT_EQ(combined.out.as<float>()[i], 0.0F);
  });
}

}  // namespace
}  // namespace tokenyard::exchange_test
