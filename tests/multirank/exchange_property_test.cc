// Laws that hold whatever the reference says.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>

#include "multirank/exchange_run.h"
#include "multirank/exchange_small.h"
#include "tokenyard/quantise.h"

namespace tokenyard::exchange_test {
namespace {

// The same data through every way of moving it: one expectation serves all, so they agree bit for bit.
TEST(ExchangeProperty, SameBitsWithAnyModeAndAnyThreads) {
  for (const Layout layout : {Layout::token_major, Layout::expert_major, Layout::expert_padded}) {
    Case c = random_case(77);
    c.values[kLayout] = static_cast<std::int64_t>(layout);
    c.values[kMode] = static_cast<std::int64_t>(Mode::throughput);
    c.values[kSizing] = static_cast<std::int64_t>(Sizing::capacity);
    for (const auto& [factor, value] : std::vector<std::pair<Factor, std::int64_t>>{{kRanks, 4},
                                                                                    {kExperts, 7},
                                                                                    {kTopK, 6},
                                                                                    {kRowBytes, 144},
                                                                                    {kDtype, static_cast<std::int64_t>(Dtype::bfloat16)},
                                                                                    {kFold, 1},
                                                                                    {kQuantise, 0},
                                                                                    {kTokens, 1},
                                                                                    {kIds, 0},
                                                                                    {kPlacement, 3},
                                                                                    {kReceiveRows, 0},
                                                                                    {kExpertCapacity, 0},
                                                                                    {kAlignment, 1},
                                                                                    {kZeroPadding, 0},
                                                                                    {kGatherMap, 0},
                                                                                    {kIdsDtype, 0},
                                                                                    {kExpertRows, 0},
                                                                                    {kWeighting, 0},
                                                                                    {kMemory, 0},
                                                                                    {kGroups, 2}}) {
      c.values[factor] = value;
    }
    for (const Mode mode : {Mode::throughput, Mode::latency}) {
      for (const int threads : {1, 2, 3}) {
        c.values[kMode] = static_cast<std::int64_t>(mode);
        c.values[kThreads] = threads;
        run_threads(c);
      }
    }
  }
}

// With experts that return their input and weights of one, every token comes back as often as there are contributions.
TEST(ExchangeProperty, IdentityExpertsReturnRowsTimesContributions) {
  for (const Layout layout : {Layout::token_major, Layout::expert_major, Layout::expert_padded}) {
    run_ranks(4, [&](World& world) {
      ExchangeOptions options = small_options();
      options.max_fanout = 2;
      Exchange exchange(world, options);
      exchange.add(Placement::tensor_parallel(kSmallExperts, 2, 2));  // experts 0, 1 on ranks 0, 1; experts 2, 3 on ranks 2, 3
      const SmallTokens<float> tokens(world.rank(), 1);
      const Received received = exchange.dispatch(tokens.input(), {.layout = layout});
      const Combined combined = exchange.combine(received.rows(), received.handle());
      for (std::int64_t t = 0; t < tokens.tokens; ++t) {
        const std::set<std::int64_t> windows = {tokens.ids[t * 2] / 2, tokens.ids[t * 2 + 1] / 2};
        const std::size_t contributions = layout == Layout::token_major ? windows.size() * 2 : kSmallTopK * 2;
        for (std::int64_t h = 0; h < kSmallHidden; ++h) {
          ASSERT_EQ(combined.out.as<float>()[t * kSmallHidden + h], static_cast<float>(contributions) * tokens.rows[t * kSmallHidden + h])
              << name(layout) << ", rank " << world.rank() << ", token " << t;
        }
      }
    });
  }
}

double dot_all(const World& world, const double* a, const double* b, std::int64_t count) {
  double mine = 0;
  for (std::int64_t i = 0; i < count; ++i) mine += a[i] * b[i];
  double sum = 0;
  for (const auto& bytes : world.all_gather(std::as_bytes(std::span(&mine, 1)))) {
    double theirs = 0;
    std::memcpy(&theirs, bytes.data(), sizeof theirs);
    sum += theirs;
  }
  return sum;
}

// <combine(y), g> = <y, backward(g)>, and <dispatch(x), g> = <x, backward(g)>: integers in float64, so equality is exact.
TEST(ExchangeProperty, GradientsAreAdjoint) {
  for (const Layout layout : {Layout::token_major, Layout::expert_major}) {
    for (const Weighting weighting : {Weighting::none, Weighting::at_expert}) {
      if (layout == Layout::token_major && weighting != Weighting::none) continue;
      run_ranks(3, [&](World& world) {
        Exchange exchange(world, small_options());
        exchange.add(small_placement(3));
        const SmallTokens<double> x(world.rank(), 2);
        const SmallTokens<double> g(world.rank(), 3);
        const Received received = exchange.dispatch(x.input(), {.layout = layout});
        const std::int64_t rows = received.rows().shape[0];
        const SmallTokens<double> y(world.rank(), 4, rows);
        const Combined combined = exchange.combine(y.rows_view(), received.handle(), {.weighting = weighting});
        const CombineGradient back = exchange.combine_backward(received.handle(), g.rows_view(), y.rows_view(), {.weighting = weighting});
        EXPECT_EQ(dot_all(world, combined.out.as<double>(), g.rows.data(), x.tokens * kSmallHidden),
                  dot_all(world, y.rows.data(), back.rows.rows().as<double>(), rows * kSmallHidden));
        const DispatchGradient dispatch_back = exchange.dispatch_backward(received.handle(), y.rows_view());
        EXPECT_EQ(dot_all(world, received.rows().as<double>(), y.rows.data(), rows * kSmallHidden),
                  dot_all(world, x.rows.data(), dispatch_back.rows.as<double>(), x.tokens * kSmallHidden));
      });
    }
  }
}

TEST(ExchangeProperty, QuantisingInDispatchIsQuantisingBefore) {
  constexpr std::int64_t kHidden = 272;  // two blocks of 128 and a short one
  for (const ScaleFormat format : {ScaleFormat::float32, ScaleFormat::float32_pow2, ScaleFormat::ue8m0}) {
    run_ranks(2, [&](World& world) {
      ExchangeOptions options = small_options();
      options.max_row_bytes = kHidden * 2;
      Exchange exchange(world, options);
      exchange.add(small_placement(2));
      const SmallTokens<float> tokens(world.rank(), 5);
      const Bytes x = random_values(static_cast<std::uint64_t>(world.rank()) + 9, tokens.tokens * kHidden, Dtype::bfloat16, false);
      const std::int64_t columns = scale_columns(kHidden, format);
      const Dtype scale_dtype = format == ScaleFormat::ue8m0 ? Dtype::int32 : Dtype::float32;
      Bytes q(tokens.tokens * kHidden);
      Bytes scales(tokens.tokens * columns * 4);
      const TensorView q_view(q.data(), Dtype::float8_e4m3, {tokens.tokens, kHidden});
      const TensorView scales_view(scales.data(), scale_dtype, {tokens.tokens, columns});
      DispatchInput input = tokens.input();
      input.rows = ConstTensorView(x.data(), Dtype::bfloat16, {tokens.tokens, kHidden});
      quantise(input.rows, q_view, scales_view, format);
      const Received inside = exchange.dispatch(input, {.quantise = format});
      input.rows = q_view;
      input.scales = scales_view;
      const Received before = exchange.dispatch(input);
      ASSERT_EQ(inside.rows().num_elements(), before.rows().num_elements());
      EXPECT_EQ(std::memcmp(inside.rows().data, before.rows().data, inside.rows().num_elements()), 0);
      EXPECT_EQ(std::memcmp(inside.scales().data, before.scales().data, inside.scales().num_elements() * 4), 0);
    });
  }
}

// Row i of a rank in token order; what token_major must give on a rank that holds all experts.
void expect_rows_of_all(const Received& received, const std::vector<SmallTokens<float>>& tokens) {
  std::int64_t slot = 0;
  for (const SmallTokens<float>& of_rank : tokens) {
    ASSERT_LE((slot + of_rank.tokens) * kSmallHidden, received.rows().num_elements());
    EXPECT_EQ(std::memcmp(received.rows().row(slot), of_rank.rows.data(), of_rank.rows.size() * sizeof(float)), 0);
    slot += of_rank.tokens;
  }
  EXPECT_EQ(received.num_rows(), slot);
}

// All experts on one rank.
Placement everything_on(int rank, int ranks) {
  return Placement::custom(ranks, std::vector<std::vector<Replica>>(kSmallExperts, {Replica{.shard_ranks = {rank}}}));
}

TEST(ExchangeProperty, SeveralPlacementsOnOneExchange) {
  run_ranks(2, [](World& world) {
    Exchange exchange(world, small_options());
    const int first = exchange.add(everything_on(0, 2));
    const int second = exchange.add(everything_on(1, 2));
    for (unsigned seed = 0; seed < 6; ++seed) {
      const std::vector<SmallTokens<float>> tokens = {SmallTokens<float>(0, seed), SmallTokens<float>(1, seed)};
      const int holder = static_cast<int>(seed % 2);
      const Received received = exchange.dispatch(tokens[world.rank()].input(), {.placement = holder == 0 ? first : second});
      EXPECT_EQ(received.handle().placement(), holder == 0 ? first : second);
      if (world.rank() == holder)
        expect_rows_of_all(received, tokens);
      else
        EXPECT_EQ(received.num_rows(), 0);
    }
    const SmallTokens<float> tokens(world.rank(), 9);
    EXPECT_EQ(exchange.dispatch(tokens.input()).handle().placement(), first);  // the default is the first one added
  });
}

TEST(ExchangeProperty, TwoExchangesDoNotMix) {
  run_ranks(2, [](World& world) {
    Exchange a(world, small_options());
    Exchange b(world, small_options());
    a.add(everything_on(0, 2));
    b.add(everything_on(0, 2));
    const std::vector<SmallTokens<float>> to_a = {SmallTokens<float>(0, 1), SmallTokens<float>(1, 1)};
    const std::vector<SmallTokens<float>> to_b = {SmallTokens<float>(0, 2), SmallTokens<float>(1, 2)};
    Pending<Received> in_a = a.start_dispatch(to_a[world.rank()].input());
    Pending<Received> in_b = b.start_dispatch(to_b[world.rank()].input());
    const Received from_b = in_b.finish();
    const Received from_a = in_a.finish();
    if (world.rank() != 0) return;
    expect_rows_of_all(from_a, to_a);
    expect_rows_of_all(from_b, to_b);
  });
}

TEST(ExchangeProperty, PhasesInterleave) {
  run_ranks(3, [](World& world) {
    Exchange exchange(world, small_options());
    exchange.add(everything_on(0, 3));
    std::vector<std::vector<SmallTokens<float>>> tokens;
    for (unsigned seed = 0; seed < 3; ++seed) {
      tokens.push_back({SmallTokens<float>(0, seed), SmallTokens<float>(1, seed), SmallTokens<float>(2, seed)});
    }
    const auto rank = static_cast<std::size_t>(world.rank());
    Pending<Received> first = exchange.start_dispatch(tokens[0][rank].input());
    Pending<Received> second = exchange.start_dispatch(tokens[1][rank].input());
    Received of_first = first.finish();
    Pending<Combined> sum_first = exchange.start_combine(of_first.rows(), of_first.handle());
    Received of_second = second.finish();
    if (rank == 0) expect_rows_of_all(of_first, tokens[0]);
    if (rank == 0) expect_rows_of_all(of_second, tokens[1]);
    Pending<Combined> sum_second = exchange.start_combine(of_second.rows(), of_second.handle());
    const Combined second_out = sum_second.finish();  // finished in another order than started
    const Combined first_out = sum_first.finish();
    of_first = Received();
    Pending<Received> third = exchange.start_dispatch(tokens[2][rank].input());
    const Received of_third = third.finish();
    if (rank == 0) expect_rows_of_all(of_third, tokens[2]);
    EXPECT_EQ(std::memcmp(first_out.out.data, tokens[0][rank].rows.data(), tokens[0][rank].rows.size() * 4), 0);
    EXPECT_EQ(std::memcmp(second_out.out.data, tokens[1][rank].rows.data(), tokens[1][rank].rows.size() * 4), 0);
  });
}

TEST(ExchangeProperty, APendingThatIsDroppedHappensAllTheSame) {
  run_ranks(2, [](World& world) {
    ExchangeOptions options = small_options();
    options.depth = 6;  // started dispatches hold a buffer each
    Exchange exchange(world, options);
    exchange.add(small_placement(2));
    const SmallTokens<float> tokens(world.rank(), 1);
    for (int i = 0; i < 5; ++i) {
      if (world.rank() == 0) {
        (void)exchange.start_dispatch(tokens.input());  // abandons the result, not the operation
      } else {
        EXPECT_NO_THROW(exchange.dispatch(tokens.input()));
      }
    }
    EXPECT_NO_THROW(exchange.dispatch(tokens.input()));
  });
}

// expert_rows() waits for peers that still read what they pull, however long they take, and then overwrites nothing of theirs.
TEST(ExchangeProperty, ExpertRowsWaitForSlowReaders) {
  constexpr std::int64_t kTokens = 300;
  constexpr std::int64_t kHidden = 8192;
  run_ranks(2, [](World& world) {
    ExchangeOptions options = small_options();
    options.max_tokens_per_rank = kTokens;
    options.max_row_bytes = kHidden * 4;
    options.expert_rows = true;
    Exchange exchange(world, options);
    exchange.add(everything_on(0, 2));
    const std::int64_t tokens = world.rank() == 1 ? kTokens : 0;  // rank 0 waits for nobody, rank 1 reads for a while
    const std::vector<float> rows(kTokens * kHidden, 1.0F);
    const std::vector<std::int64_t> ids(kTokens * kSmallTopK, 1);
    const Received received = exchange.dispatch({.rows = {rows.data(), Dtype::float32, {tokens, kHidden}},
                                                 .scales = {},
                                                 .topk_ids = {ids.data(), Dtype::int64, {tokens, kSmallTopK}},
                                                 .topk_weights = {}});
    for (int i = 1; i < 5; ++i) {
      const TensorView y = exchange.expert_rows(received.handle(), Dtype::float32, kHidden);
      std::fill_n(y.as<float>(), y.num_elements(), static_cast<float>(i));
      const Combined combined = exchange.combine(y, received.handle());
      const std::int64_t count = combined.out.num_elements();
      EXPECT_EQ(std::count(combined.out.as<float>(), combined.out.as<float>() + count, static_cast<float>(i)), count);
    }
  });
}

TEST(ExchangeProperty, AHandleIsReusedAnyNumberOfTimesAndOutlivesItsLease) {
  run_ranks(3, [](World& world) {
    ExchangeOptions options = small_options();
    options.depth = 1;
    Exchange exchange(world, options);
    exchange.add(small_placement(3));
    const SmallTokens<float> first(world.rank(), 1);
    Handle handle;
    std::vector<std::int32_t> sources;
    {
      const Received received = exchange.dispatch(first.input());
      handle = received.handle();
      const ConstTensorView view = received.source_token();
      sources.assign(view.as<std::int32_t>(), view.as<std::int32_t>() + view.num_elements());
    }
    for (unsigned seed = 2; seed < 12; ++seed) {
      const SmallTokens<float> again(world.rank(), seed);
      const Received received = exchange.dispatch(again.rows_only(), handle);
      const ConstTensorView view = received.source_token();
      EXPECT_TRUE(std::equal(sources.begin(), sources.end(), view.as<std::int32_t>(), view.as<std::int32_t>() + view.num_elements()));
      const Combined combined = exchange.combine(received.rows(), handle);
      for (std::int64_t t = 0; t < again.tokens; ++t) {
        const float value = combined.out.as<float>()[t * kSmallHidden];
        const float row = again.rows[t * kSmallHidden];
        EXPECT_TRUE(value == row || value == 2 * row) << value << " of " << row;
      }
    }
  });
}

}  // namespace
}  // namespace tokenyard::exchange_test
