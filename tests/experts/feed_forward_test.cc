// What experts compute, against naive loops in float64 and finite differences, with NaN around everything that is not theirs.

#include "tokenyard/experts.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "experts/rows.h"
#include "unit/expect_usage_error.h"

namespace tokenyard {
namespace {

using testing::Buffer;
using testing::Case;
using testing::expect_usage_error;
using testing::random_case;
using testing::SeededRandom;

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// Relative to sums of `terms` products of numbers around 1.
double tolerance(Dtype dtype, std::int64_t terms) {
  const double rounding = dtype == Dtype::float32 ? 2e-6 : dtype == Dtype::float16 ? 1e-3 : 8e-3;
  return rounding * (2 + std::sqrt(static_cast<double>(terms)));
}

// Every place of a group is near `expected`; every other place still holds what was there before: NaN.
template <class Expected>
void expect_places(const Buffer& out, const RowGroups& groups, double within, Expected&& expected) {
  std::vector<int> group_of(static_cast<std::size_t>(groups.places), -1);
  for (int g = 0; g < std::ssize(groups.counts); ++g) {
    std::fill_n(group_of.begin() + groups.begins[g], groups.counts[g], g);
  }
  for (std::int64_t p = 0; p < groups.places; ++p) {
    for (std::int64_t c = 0; c < out.columns(); ++c) {
      if (group_of[p] < 0) {
        ASSERT_TRUE(std::isnan(out.at(p, c))) << "padding place " << p << " was written";
      } else {
        ASSERT_NEAR(out.at(p, c), expected(group_of[p], p, c), within) << "place " << p << ", column " << c;
      }
    }
  }
}

TEST(GroupedGemm, ForwardDgradAndWgradAreTheirDefinitions) {
  SeededRandom random;
  for (int round = 0; round < 40; ++round) {
    const Dtype dtype = random.pick(kDtypes);
    const Case c = random_case(random);
    SCOPED_TRACE(c.describe() + std::string(name(dtype)));
    const std::int64_t outputs = random.between(1, 40);
    const std::int64_t inputs = random.between(1, 70);
    const Buffer x = Buffer::rows(random, dtype, c, inputs);
    const Buffer w = Buffer::random(random, dtype, c.experts() * outputs, inputs);
    const Buffer bias = Buffer::random(random, dtype, c.experts(), outputs);
    const Buffer dy = Buffer::places(random, dtype, c, outputs);
    const ConstTensorView weights(w.data(), dtype, {c.experts(), outputs, inputs});

    Buffer y = Buffer::nan(dtype, c.groups.places, outputs);
    grouped_gemm(x.view(), c.groups, weights, bias.view(), y.view());
    expect_places(y, c.groups, tolerance(dtype, inputs), [&](int g, std::int64_t p, std::int64_t o) {
      double sum = bias.at(g, o);
      for (std::int64_t i = 0; i < inputs; ++i) sum += x.at(c.row(p), i) * w.at(g * outputs + o, i);
      return sum;
    });

    Buffer dx = Buffer::nan(dtype, c.groups.places, inputs);
    grouped_gemm_dgrad(dy.view(), c.groups, weights, dx.view());
    expect_places(dx, c.groups, tolerance(dtype, outputs), [&](int g, std::int64_t p, std::int64_t i) {
      double sum = 0;
      for (std::int64_t o = 0; o < outputs; ++o) sum += dy.at(p, o) * w.at(g * outputs + o, i);
      return sum;
    });

    Buffer dw = Buffer::filled(Dtype::float32, c.experts() * outputs, inputs, 1.0F);
    grouped_gemm_wgrad(dy.view(), x.view(), c.groups, {dw.data(), Dtype::float32, {c.experts(), outputs, inputs}});
    for (int g = 0; g < c.experts(); ++g) {
      for (std::int64_t o = 0; o < outputs; ++o) {
        for (std::int64_t i = 0; i < inputs; ++i) {
          double sum = 1;
          for (std::int64_t p = c.groups.begins[g]; p < c.groups.begins[g] + c.groups.counts[g]; ++p)
            sum += dy.at(p, o) * x.at(c.row(p), i);
          ASSERT_NEAR(dw.at(g * outputs + o, i), sum, tolerance(Dtype::float32, c.groups.counts[g]));
        }
      }
    }
  }
}

// More rows than one product gets at once.
TEST(GroupedGemm, LongGroups) {
  SeededRandom random;
  const std::int64_t rows = 700;
  RowGroups groups = {.places = rows, .begins = {0, 0, 513}, .counts = {0, 513, 187}, .rows = {}};
  const Buffer x = Buffer::random(random, Dtype::float32, rows, 8);
  const Buffer w = Buffer::random(random, Dtype::float32, 3 * 5, 8);
  Buffer y = Buffer::nan(Dtype::float32, rows, 5);
  grouped_gemm(x.view(), groups, {w.data(), Dtype::float32, {3, 5, 8}}, {}, y.view());
  expect_places(y, groups, 1e-5, [&](int g, std::int64_t p, std::int64_t o) {
    double sum = 0;
    for (std::int64_t i = 0; i < 8; ++i) sum += x.at(p, i) * w.at(g * 5 + o, i);
    return sum;
  });
}

// The naive expert: one row, float64.
struct NaiveExpert {
  Activation activation;
  std::int64_t hidden, width;
  std::vector<double> w13, w2, w13_bias, w2_bias;  // of one expert

  double act(double gate, double up) const {
    if (activation.kind == ActivationKind::silu) return gate / (1 + std::exp(-gate)) * up;
    const double g = std::min(gate, double{activation.limit});
    const double u = std::max(std::min(up, double{activation.limit}), -double{activation.limit});
    return (u + 1) * g / (1 + std::exp(-activation.alpha * g));
  }
  std::vector<double> operator()(const std::vector<double>& x) const {
    std::vector<double> a;
    for (std::int64_t i = 0; i < width; ++i) {
      double gate = w13_bias[i];
      double up = w13_bias[width + i];
      for (std::int64_t h = 0; h < hidden; ++h) {
        gate += w13[i * hidden + h] * x[h];
        up += w13[(width + i) * hidden + h] * x[h];
      }
      a.push_back(act(gate, up));
    }
    std::vector<double> y = w2_bias;
    for (std::int64_t h = 0; h < hidden; ++h) {
      for (std::int64_t i = 0; i < width; ++i) y[h] += w2[h * width + i] * a[i];
    }
    return y;
  }
};

// Weights of all experts in one dtype, and as naive experts.
struct Model {
  Dtype dtype;
  std::int64_t experts, hidden, width;
  bool has_bias;
  Activation activation;
  Buffer w13, w2, w13_bias, w2_bias;

  Model(SeededRandom& random, Dtype type, std::int64_t count, const Activation& kind)
      : dtype(type),
        experts(count),
        hidden(random.between(1, 20)),
        width(random.between(1, 24)),
        has_bias(random.one_in(2)),
        activation(kind),
        w13(Buffer::random(random, type, count * 2 * width, hidden)),
        w2(Buffer::random(random, type, count * hidden, width)),
        w13_bias(Buffer::random(random, type, count, 2 * width)),
        w2_bias(Buffer::random(random, type, count, hidden)) {}

  ExpertWeights weights() const {
    ExpertWeights result = {.w13 = {w13.data(), dtype, {experts, 2, width, hidden}}, .w2 = {w2.data(), dtype, {experts, hidden, width}}};
    if (has_bias) result.w13_bias = {w13_bias.data(), dtype, {experts, 2, width}};
    if (has_bias) result.w2_bias = {w2_bias.data(), dtype, {experts, hidden}};
    return result;
  }
  NaiveExpert naive(std::int64_t g) const {
    const auto part = [&](const Buffer& buffer, bool used) {
      std::vector<double> values;
      const std::int64_t rows = buffer.row_count() / experts;
      for (std::int64_t r = g * rows; r < (g + 1) * rows; ++r) {
        for (std::int64_t c = 0; c < buffer.columns(); ++c) values.push_back(used ? buffer.at(r, c) : 0.0);
      }
      return values;
    };
    return {activation, hidden, width, part(w13, true), part(w2, true), part(w13_bias, has_bias), part(w2_bias, has_bias)};
  }
};

std::vector<double> row_of(const Buffer& buffer, std::int64_t row) {
  std::vector<double> values;
  for (std::int64_t c = 0; c < buffer.columns(); ++c) values.push_back(buffer.at(row, c));
  return values;
}

constexpr Activation kActivations[] = {{}, {.kind = ActivationKind::clamped, .limit = 1.5F, .alpha = 1.702F}};

TEST(Experts, ForwardIsTheNaiveExpert) {
  SeededRandom random;
  for (int round = 0; round < 40; ++round) {
    const Dtype dtype = random.pick(kDtypes);
    const Case c = random_case(random);
    const Model model(random, dtype, c.experts(), random.pick(kActivations));
    SCOPED_TRACE(c.describe() + std::string(name(dtype)));
    const Buffer x = Buffer::rows(random, dtype, c, model.hidden);
    Buffer y = Buffer::nan(dtype, c.groups.places, model.hidden);
    experts_forward(x.view(), c.groups, model.weights(), model.activation, y.view(), nullptr);
    std::vector<NaiveExpert> naive;
    for (int g = 0; g < c.experts(); ++g) naive.push_back(model.naive(g));
    expect_places(y, c.groups, 4 * tolerance(dtype, model.width * model.hidden),
                  [&](int g, std::int64_t p, std::int64_t h) { return naive[g](row_of(x, c.row(p)))[h]; });
  }
}

// d sum(dy . y) by central differences, of every weight and of every row.
TEST(Experts, BackwardIsFiniteDifferences) {
  SeededRandom random;
  for (int round = 0; round < 12; ++round) {
    const Case c = random_case(random);
    const Model model(random, Dtype::float32, c.experts(), random.pick(kActivations));
    SCOPED_TRACE(c.describe());
    const Buffer x = Buffer::rows(random, Dtype::float32, c, model.hidden);
    const Buffer dy = Buffer::places(random, Dtype::float32, c, model.hidden);
    Buffer y = Buffer::nan(Dtype::float32, c.groups.places, model.hidden);
    Buffer dx = Buffer::nan(Dtype::float32, c.groups.places, model.hidden);
    Buffer d_w13 = Buffer::filled(Dtype::float32, c.experts() * 2 * model.width, model.hidden, 0);
    Buffer d_w2 = Buffer::filled(Dtype::float32, c.experts() * model.hidden, model.width, 0);
    Buffer d_w13_bias = Buffer::filled(Dtype::float32, c.experts(), 2 * model.width, 0);
    Buffer d_w2_bias = Buffer::filled(Dtype::float32, c.experts(), model.hidden, 0);
    ExpertGradients gradients = {.w13 = {d_w13.data(), Dtype::float32, {c.experts(), 2, model.width, model.hidden}},
                                 .w2 = {d_w2.data(), Dtype::float32, {c.experts(), model.hidden, model.width}}};
    if (model.has_bias) {
      gradients.w13_bias = {d_w13_bias.data(), Dtype::float32, {c.experts(), 2, model.width}};
      gradients.w2_bias = d_w2_bias.view();
    }
    ExpertActivations saved;
    experts_forward(x.view(), c.groups, model.weights(), model.activation, y.view(), &saved);
    experts_backward({.x = x.view(), .dy = dy.view(), .saved = &saved}, c.groups, model.weights(), model.activation, dx.view(), gradients);

    // The loss of one expert's places as a function of its weights, or of one place as a function of its row.
    const auto loss = [&](const NaiveExpert& expert, int g) {
      double sum = 0;
      for (std::int64_t p = c.groups.begins[g]; p < c.groups.begins[g] + c.groups.counts[g]; ++p) {
        const std::vector<double> out = expert(row_of(x, c.row(p)));
        for (std::int64_t h = 0; h < model.hidden; ++h) sum += out[h] * dy.at(p, h);
      }
      return sum;
    };
    constexpr double kStep = 1e-6;
    const auto near = [](double value, double difference) { EXPECT_NEAR(value, difference, 2e-4 * (1 + std::abs(difference))); };
    for (int g = 0; g < c.experts(); ++g) {
      const auto check = [&](std::vector<double> NaiveExpert::*field, const Buffer& d) {
        for (int probe = 0; probe < 8; ++probe) {
          NaiveExpert expert = model.naive(g);
          const auto at = static_cast<std::size_t>(random.between(0, std::ssize(expert.*field) - 1));
          (expert.*field)[at] += kStep;
          const double more = loss(expert, g);
          (expert.*field)[at] -= 2 * kStep;
          near(d.at_index(g * std::ssize(expert.*field) + static_cast<std::int64_t>(at)), (more - loss(expert, g)) / (2 * kStep));
        }
      };
      check(&NaiveExpert::w13, d_w13);
      check(&NaiveExpert::w2, d_w2);
      if (model.has_bias) check(&NaiveExpert::w13_bias, d_w13_bias);
      if (model.has_bias) check(&NaiveExpert::w2_bias, d_w2_bias);
    }
    expect_places(dx, c.groups, 2e-3, [&](int g, std::int64_t p, std::int64_t i) {
      const NaiveExpert expert = model.naive(g);
      std::vector<double> row = row_of(x, c.row(p));
      const auto at = [&](double offset) {
        std::vector<double> moved = row;
        moved[i] += offset;
        const std::vector<double> out = expert(moved);
        double sum = 0;
        for (std::int64_t h = 0; h < model.hidden; ++h) sum += out[h] * dy.at(p, h);
        return sum;
      };
      return (at(kStep) - at(-kStep)) / (2 * kStep);
    });
  }
}

TEST(Experts, ClampedGateOfOneNumber) {
  // gate 10 is held at 7, up -20 at -7: 7 * sigmoid(1.702 * 7) * (-7 + 1).
  const std::vector<float> w13 = {10, -20};
  const float w2 = 1;
  const float x = 1;
  float y = 0;
  const RowGroups groups = {.places = 1, .begins = {0}, .counts = {1}, .rows = {}};
  experts_forward({&x, Dtype::float32, {1, 1}}, groups,
                  {.w13 = {w13.data(), Dtype::float32, {1, 2, 1, 1}}, .w2 = {&w2, Dtype::float32, {1, 1, 1}}},
                  {.kind = ActivationKind::clamped}, {&y, Dtype::float32, {1, 1}}, nullptr);
  EXPECT_NEAR(y, 7.0 / (1.0 + std::exp(-1.702 * 7.0)) * -6.0, 1e-4);
}

TEST(Permute, ThereAndFoldedBack) {
  SeededRandom random;
  for (int round = 0; round < 40; ++round) {
    const Dtype dtype = random.pick(kDtypes);
    const std::int64_t rows = random.between(0, 30);
    const std::int64_t top_k = random.between(1, 4);
    const int experts = static_cast<int>(random.between(1, 5));
    std::vector<std::int32_t> ids;
    std::vector<float> weights;
    for (std::int64_t i = 0; i < rows * top_k; ++i) {
      ids.push_back(static_cast<std::int32_t>(random.between(-1, experts - 1)));
      weights.push_back(random.one_in(9) ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(random.between(-9, 9)) / 4);
      if (ids.back() >= 0 && std::isnan(weights.back())) weights.back() = 0.5F;  // a weight without an expert is not looked at
    }
    const ConstTensorView local_ids(ids.data(), Dtype::int32, {rows, top_k});
    const RowGroups groups = RowGroups::gathered(local_ids, experts);
    const Buffer x = Buffer::random(random, dtype, rows, 8);
    Buffer places = Buffer::nan(dtype, groups.places, 8);
    permute(x.view(), groups, places.view());
    for (std::int64_t p = 0; p < groups.places; ++p) {
      for (std::int64_t h = 0; h < 8; ++h) ASSERT_EQ(places.at(p, h), x.at(groups.rows[p], h));
    }
    for (const bool weighted : {false, true}) {
      Buffer out = Buffer::nan(dtype, rows, 8);
      const ConstTensorView row_weights(weights.data(), Dtype::float32, {rows, top_k});
      unpermute({places.view(), local_ids, weighted ? row_weights : ConstTensorView()}, groups, out.view());
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t h = 0; h < 8; ++h) {
          float sum = 0;
          for (std::int64_t k = 0; k < top_k; ++k) {
            const auto value = static_cast<float>(x.at(r, h));
            if (ids[r * top_k + k] >= 0) sum = weighted ? std::fma(weights[r * top_k + k], value, sum) : sum + value;
          }
          ASSERT_EQ(out.at(r, h), Buffer::rounded(sum, dtype));
        }
      }
    }
  }
}

TEST(RowGroups, PlacesAreOrderedByExpertRowAndK) {
  const std::vector<std::int32_t> ids = {1, 0, -1, 1, 1, 1};
  const RowGroups groups = RowGroups::gathered({ids.data(), Dtype::int32, {3, 2}}, 3);
  EXPECT_EQ(groups.counts, (std::vector<std::int64_t>{1, 4, 0}));
  EXPECT_EQ(groups.begins, (std::vector<std::int64_t>{0, 1, 5}));
  EXPECT_EQ(groups.rows, (std::vector<std::int64_t>{0, 0, 1, 2, 2}));
}

TEST(Experts, Errors) {
  SeededRandom random;
  const RowGroups groups = {.places = 4, .begins = {0, 2}, .counts = {2, 1}, .rows = {}};
  const Buffer x = Buffer::random(random, Dtype::float32, 4, 3);
  const Buffer w = Buffer::random(random, Dtype::float32, 2 * 5, 3);
  Buffer y = Buffer::nan(Dtype::float32, 4, 5);
  const ConstTensorView weights(w.data(), Dtype::float32, {2, 5, 3});
  expect_usage_error(
      [&] {
        grouped_gemm(x.view(), groups, {w.data(), Dtype::float32, {2, 3, 5}}, {}, y.view());
      },
      {"w is [2, 3, 5] float32", "[2, 3, 3]"});
  expect_usage_error([&] { grouped_gemm(x.view(), groups, weights, {}, {y.data(), Dtype::float32, {3, 5}}); }, {"y is [3, 5]", "[4, 5]"});
  RowGroups wrong = groups;
  wrong.counts[1] = 3;
  expect_usage_error([&] { grouped_gemm(x.view(), wrong, weights, {}, y.view()); }, {"group 1 has places 2 to 5", "there are 4"});
  wrong = groups;
  wrong.rows = {0, 1, 4, 0};
  expect_usage_error([&] { grouped_gemm(x.view(), wrong, weights, {}, y.view()); }, {"place 2 is row 4", "x has 4"});
  expect_usage_error([&] { experts_forward(x.view(), groups, {}, {}, y.view(), nullptr); }, {"w13 is absent"});
  const std::vector<std::int32_t> ids = {2};
  expect_usage_error([&] { RowGroups::gathered({ids.data(), Dtype::int32, {1, 1}}, 2); }, {"local_ids has 2", "2 local experts"});
  const std::vector<std::int64_t> counts = {5};
  expect_usage_error([&] { RowGroups::padded({counts.data(), Dtype::int64, {1}}, 4); }, {"counts[0] = 5", "capacity of 4"});
}

}  // namespace
}  // namespace tokenyard
