// The feed-forward of float8 weights on a GPU: its rows are quantised as quantise() does it, and what it makes of them is near what the
// same steps give in float64.

#include <algorithm>

#include "device/experts_side.h"
#include "device/gpus.h"
#include "experts/float8_weights.h"
#include "tokenyard/quantise.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::device_test {
namespace {

using testing::expect_usage_error;
using testing::Float8Experts;
using testing::SeededRandom;

class DeviceFloat8Experts : public OnGpu {};

ConstTensorView shaped(const ConstTensorView& flat, std::initializer_list<std::int64_t> shape) { return {flat.data, flat.dtype, shape}; }

// Rows as float8 and scales, as the CPU makes them.
struct Quantised {
  explicit Quantised(const ConstTensorView& x)
      : columns(x.shape[1]),
        blocks(scale_columns(columns, ScaleFormat::float32)),
        values(static_cast<std::size_t>(x.shape[0] * columns)),
        scales(static_cast<std::size_t>(x.shape[0] * blocks)) {
    quantise(x, {values.data(), Dtype::float8_e4m3, {x.shape[0], columns}}, {scales.data(), Dtype::float32, {x.shape[0], blocks}},
             ScaleFormat::float32);
  }
  double at(std::int64_t row, std::int64_t column) const {
    return static_cast<double>(float8_e4m3_to_float(values[static_cast<std::size_t>(row * columns + column)])) *
           scales[static_cast<std::size_t>(row * blocks + column / kQuantiseBlock)];
  }
  std::int64_t columns, blocks;
  std::vector<std::uint8_t> values;
  std::vector<float> scales;
};

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double activated(const Activation& a, double gate, double up) {
  if (a.kind == ActivationKind::silu) return gate * sigmoid(gate) * up;
  const double g = std::min<double>(gate, a.limit);
  return g * sigmoid(a.alpha * g) * (std::clamp<double>(up, -a.limit, a.limit) + 1.0);
}

struct Experiment {
  Experiment(SeededRandom& random, Dtype of_dtype)
      : dtype(of_dtype),
        c(testing::random_case(random, 60)),
        weights(random, c.experts(), 128 * random.between(1, 2), 16 * random.between(1, 18)),
        x(Buffer::rows(random, dtype, c, weights.hidden, random.one_in(2) ? 3 : 8)),
        w13_bias(Buffer::random(random, dtype, c.experts(), 2 * weights.width)),
        w2_bias(Buffer::random(random, dtype, c.experts(), weights.hidden)) {}
  std::string describe() const {
    return c.describe() + std::string(name(dtype)) + " hidden " + std::to_string(weights.hidden) + " width " +
           std::to_string(weights.width);
  }

  ExpertWeights upload_weights(Uploads& upload) const {
    ExpertWeights views = weights.views();
    const auto move = [&](ConstTensorView& view, const ConstTensorView& there) { view.data = there.data; };
    move(views.w13, upload.numbers(weights.w13.values, Dtype::float8_e4m3));
    move(views.w2, upload.numbers(weights.w2.values, Dtype::float8_e4m3));
    move(views.w13_scale, upload.numbers(weights.w13.scales, Dtype::float32));
    move(views.w2_scale, upload.numbers(weights.w2.scales, Dtype::float32));
    views.w13_bias = shaped(upload(w13_bias), {c.experts(), 2, weights.width});
    views.w2_bias = shaped(upload(w2_bias), {c.experts(), weights.hidden});
    return views;
  }

  // In the steps of the device, by place: rows, gate and up rounded to the rows' type, the activation as float8.
  std::vector<double> expected(const Quantised& rows, const Activation& activation) const {
    const std::int64_t width = weights.width, hidden = weights.hidden, places = c.groups.places;
    std::vector<float> act(static_cast<std::size_t>(places * width));
    for_each_place(c.groups, [&](int g, std::int64_t p) {
      std::vector<double> gate_up;
      for (std::int64_t j = 0; g >= 0 && j < 2 * width; ++j) {
        double sum = w13_bias.at(g, j);
        for (std::int64_t h = 0; h < hidden; ++h)
          sum += rows.at(c.row(p), h) * weights.w13.at(std::int64_t{g} * 2 + j / width, j % width, h);
        gate_up.push_back(Buffer::rounded(static_cast<float>(sum), dtype));
      }
      for (std::int64_t i = 0; g >= 0 && i < width; ++i)
        act[p * width + i] = static_cast<float>(activated(activation, gate_up[i], gate_up[width + i]));
    });
    const Quantised float8({act.data(), Dtype::float32, {places, width}});
    std::vector<double> y(static_cast<std::size_t>(places * hidden));
    for_each_place(c.groups, [&](int g, std::int64_t p) {
      for (std::int64_t h = 0; g >= 0 && h < hidden; ++h) {
        double& sum = y[p * hidden + h] = w2_bias.at(g, h);
        for (std::int64_t i = 0; i < width; ++i) sum += float8.at(p, i) * weights.w2.at(g, h, i);
      }
    });
    return y;
  }

  Dtype dtype;
  Case c;
  Float8Experts weights;
  Buffer x, w13_bias, w2_bias;
};

TEST_F(DeviceFloat8Experts, ComputeWhatTheirStepsGiveInFloat64) {
  SeededRandom random;
  DeviceExperts experts({.device = 0});
  constexpr Activation kActivations[] = {{}, {.kind = ActivationKind::clamped, .limit = 0.8F, .alpha = 1.702F}};
  for (int round = 0; round < 8; ++round) {
    const Experiment e(random, round % 2 == 0 ? Dtype::bfloat16 : Dtype::float16);
    SCOPED_TRACE(e.describe());
    const Activation& activation = kActivations[round / 2 % 2];
    const std::int64_t hidden = e.weights.hidden;
    Uploads upload;
    const ExpertWeights weights = e.upload_weights(upload);
    const DeviceRowGroups groups = upload(e.c.groups);
    Buffer y = Buffer::nan(e.dtype, e.c.groups.places, hidden, 8), of_float8_rows = y;
    const TensorView y_there = upload(y), other_there = upload(of_float8_rows);
    experts.experts_forward({.x = upload(e.x)}, groups, weights, activation, y_there, nullptr);
    fetch(y_there, y);
    const Quantised rows(e.x.view());
    const std::vector<double> expected = e.expected(rows, activation);
    // Of either type: sums of float8 products are not float32's to the last bit, and an activation near the middle of two float8
    // numbers becomes the other one, an eighth away.
    expect_near(
        y, e.c.groups, [&](int, std::int64_t p, std::int64_t h) { return expected[p * hidden + h]; }, "y", 1e-2);

    // Rows that come as float8: those that the device makes are the same, bit for bit.
    const ConstTensorView values = shaped(upload.numbers(rows.values, Dtype::float8_e4m3), {e.c.num_rows, hidden});
    const ConstTensorView scales = shaped(upload.numbers(rows.scales, Dtype::float32), {e.c.num_rows, rows.blocks});
    experts.experts_forward({.x = values, .x_scales = scales}, groups, weights, activation, other_there, nullptr);
    fetch(other_there, of_float8_rows);
    EXPECT_EQ(std::memcmp(y.data(), of_float8_rows.data(), y.num_bytes()), 0);
  }
}

TEST_F(DeviceFloat8Experts, WrongArgumentsAreNamed) {
  SeededRandom random;
  const Experiment e(random, Dtype::bfloat16);
  Uploads upload;
  DeviceExperts experts({.device = 0});
  const ExpertWeights weights = e.upload_weights(upload);
  const DeviceRowGroups groups = upload(e.c.groups);
  const TensorView x = upload(e.x), y = upload(Buffer::nan(Dtype::bfloat16, e.c.groups.places, e.weights.hidden, 8));
  const auto forward = [&](const DeviceExperts::Forward& input, const TensorView& out) {
    experts.experts_forward(input, groups, weights, {}, out, nullptr);
  };
  expect_usage_error([&] { forward({.x = x, .gate_up = y}, y); }, {"float8_e4m3 goes forward only", "widen the weights"});
  expect_usage_error([&] { forward({.x = x, .x_scales = y}, y); }, {"x_scales", "give none"});
  TensorView wide = x;
  wide.dtype = Dtype::float32;
  expect_usage_error([&] { forward({.x = wide}, y); }, {"x is", "float32", "bfloat16 or float16"});
  TensorView narrow = x;
  narrow.dtype = Dtype::float8_e4m3;
  expect_usage_error([&] { forward({.x = shaped(narrow, {x.shape[0], x.shape[1]})}, y); }, {"x's scales is absent"});
  expect_usage_error([&] { experts.experts_backward({}, groups, weights, {}, nullptr); }, {"float8_e4m3 goes forward only"});
}

}  // namespace
}  // namespace tokenyard::device_test
