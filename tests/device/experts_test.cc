// Products of experts on a GPU against sums in float64, with NaN around everything that is not theirs: padding, the rows that no
// expert chose, the gaps between rows. Sizes and strides are drawn so that both the Hopper kernels and the others get their share.

#include <cuda_runtime_api.h>

#include "device/experts_side.h"
#include "device/gpus.h"
#include "memory/cuda_graph.h"
#include "unit/expect_usage_error.h"

namespace tokenyard::device_test {
namespace {

using testing::expect_usage_error;
using testing::SeededRandom;

class DeviceExpertsTest : public OnGpu {};

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// A product of random shape: y = x w^T + bias, dx = dy w, dw = 1 + dy^T x.
struct ProductCase {
  explicit ProductCase(SeededRandom& random, Dtype of_dtype, bool aligned)
      : dtype(of_dtype),
        c(testing::random_case(random, aligned ? 300 : 90)),
        outputs(aligned ? 8 * random.between(1, 50) : random.between(1, 150)),
        inputs(aligned ? 8 * random.between(1, 40) : random.between(1, 150)),
        gap(aligned ? 8 : 3),
        x(Buffer::rows(random, dtype, c, inputs, gap)),
        w(Buffer::random(random, dtype, c.experts() * outputs, inputs)),
        bias(Buffer::random(random, dtype, c.experts(), outputs)),
        dy(Buffer::places(random, dtype, c, outputs, gap)) {}

  double y_at(int g, std::int64_t p, std::int64_t o, bool has_bias) const {
    double sum = has_bias ? bias.at(g, o) : 0.0;
    for (std::int64_t i = 0; i < inputs; ++i) sum += x.at(c.row(p), i) * w.at(g * outputs + o, i);
    return sum;
  }
  double dx_at(int g, std::int64_t p, std::int64_t i) const {
    double sum = 0;
    for (std::int64_t o = 0; o < outputs; ++o) sum += dy.at(p, o) * w.at(g * outputs + o, i);
    return sum;
  }
  std::string describe() const {
    return c.describe() + std::string(name(dtype)) + " outputs " + std::to_string(outputs) + " inputs " + std::to_string(inputs);
  }

  Dtype dtype;
  Case c;
  std::int64_t outputs, inputs, gap;
  Buffer x, w, bias, dy;
};

void expect_products(const ProductCase& p, DeviceExperts& experts) {
  Uploads upload;
  DeviceRowGroups groups = upload(p.c.groups);
  const std::int64_t num = p.c.experts();
  const TensorView x = upload(p.x), dy = upload(p.dy);
  const TensorView w = shaped(upload(p.w), {num, p.outputs, p.inputs});
  constexpr std::int64_t kMany = 1 << 20;
  for (const auto& [has_bias, likely] : {std::pair(true, kMany), {false, std::int64_t{1}}, {true, std::int64_t{0}}}) {
    Buffer y = Buffer::nan(p.dtype, p.c.groups.places, p.outputs, p.gap);
    const TensorView on_device = upload(y);
    groups.likely = likely;
    experts.grouped_gemm(x, groups, w, has_bias ? ConstTensorView(upload(p.bias)) : ConstTensorView(), on_device, nullptr);
    fetch(on_device, y);
    expect_near(
        y, p.c.groups, [&](int g, std::int64_t at, std::int64_t o) { return p.y_at(g, at, o, has_bias); }, "y");
  }
  Buffer dx = Buffer::nan(p.dtype, p.c.groups.places, p.inputs, p.gap);
  const TensorView dx_on_device = upload(dx);
  experts.grouped_gemm_dgrad(dy, groups, w, dx_on_device, nullptr);
  fetch(dx_on_device, dx);
  expect_near(
      dx, p.c.groups, [&](int g, std::int64_t at, std::int64_t i) { return p.dx_at(g, at, i); }, "dx");

  Buffer dw = Buffer::filled(Dtype::float32, num * p.outputs, p.inputs, 1.0F);
  const TensorView dw_on_device = upload(dw);
  experts.grouped_gemm_wgrad(dy, x, groups, shaped(dw_on_device, {num, p.outputs, p.inputs}), nullptr);
  fetch(dw_on_device, dw);
  std::vector<double> expected(static_cast<std::size_t>(num * p.outputs * p.inputs), 1.0);
  for_each_place(p.c.groups, [&](int g, std::int64_t at) {
    for (std::int64_t o = 0; g >= 0 && o < p.outputs; ++o) {
      for (std::int64_t i = 0; i < p.inputs; ++i) expected[(g * p.outputs + o) * p.inputs + i] += p.dy.at(at, o) * p.x.at(p.c.row(at), i);
    }
  });
  Nearness near;
  for (std::int64_t i = 0; i < std::ssize(expected); ++i) near.add(dw.at_index(i), expected[i]);
  near.expect_within(1e-5, "dw");
}

TEST_F(DeviceExpertsTest, AlignedProductsAreTheirDefinitions) {
  SeededRandom random;
  DeviceExperts experts({.device = 0, .sm_margin = 1});
  for (int round = 0; round < 12; ++round) {
    const ProductCase product(random, kDtypes[1 + round % 2], true);
    SCOPED_TRACE(product.describe());
    expect_products(product, experts);
  }
}

TEST_F(DeviceExpertsTest, ProductsOfAnyShapeAreTheirDefinitions) {
  SeededRandom random;
  DeviceExperts experts({.device = 0});
  for (int round = 0; round < 18; ++round) {
    const ProductCase product(random, kDtypes[round % 3], false);
    SCOPED_TRACE(product.describe());
    expect_products(product, experts);
  }
}

// Tables that a caller got wrong reach no memory but the tensors': counts beyond the places, and rows that x does not have.
TEST_F(DeviceExpertsTest, WrongTablesStayInsideTheTensors) {
  Uploads upload;
  DeviceExperts experts({.device = 0});
  for (const std::int64_t columns : {64, 7}) {
    const Buffer x = Buffer::filled(Dtype::bfloat16, 4, columns, 1.0F), w = Buffer::filled(Dtype::bfloat16, 2 * 8, columns, 1.0F);
    Buffer y = Buffer::nan(Dtype::bfloat16, 4, 8, 0);
    const TensorView y_on_device = upload(y);
    const DeviceRowGroups groups = {.places = 4,
                                    .counts = upload.numbers<std::int32_t>({1 << 20, 3}, Dtype::int32),
                                    .begins = upload.numbers<std::int32_t>({0, -9}, Dtype::int32),
                                    .rows = upload.numbers<std::int32_t>({1, -5, 1 << 20, 2}, Dtype::int32)};
    experts.grouped_gemm(upload(x), groups, shaped(upload(w), {2, 8, columns}), {}, y_on_device, nullptr);
    fetch(y_on_device, y);
    for (std::int64_t p = 0; p < 4; ++p) EXPECT_EQ(y.at(p, 3), p == 1 || p == 2 ? 0.0 : static_cast<double>(columns)) << p;
  }
}

TEST_F(DeviceExpertsTest, ReplayedGraphsReadTheCountsOfTheirTime) {
  SeededRandom random;
  Uploads upload;
  DeviceExperts experts({.device = 0});
  const std::int64_t places = 512, columns = 128;
  const Buffer x = Buffer::random(random, Dtype::bfloat16, places, columns);
  const Buffer w = Buffer::random(random, Dtype::bfloat16, 2 * columns, columns);
  Buffer y = Buffer::nan(Dtype::bfloat16, places, columns, 0);
  const TensorView y_on_device = upload(y), x_on_device = upload(x), w_on_device = shaped(upload(w), {2, columns, columns});
  const ConstTensorView counts = upload.numbers<std::int32_t>({1, 1}, Dtype::int32);
  const DeviceRowGroups groups = {.places = places, .counts = counts, .capacity = places / 2};
  const auto stream = value_or_throw(borrow_cuda_stream());
  const auto call = [&] { experts.grouped_gemm(x_on_device, groups, w_on_device, {}, y_on_device, stream.get()); };
  expect_usage_error([&] { const CudaGraph refused(stream.get(), call); }, {"scratch memory", "once before the capture"});
  call();
  const CudaGraph graph(stream.get(), call);
  for (const std::vector<std::int32_t>& now : {std::vector<std::int32_t>{0, 200}, {256, 7}, {130, 0}}) {
    cuda_check(cudaMemcpy(const_cast<void*>(counts.data), now.data(), 8, cudaMemcpyHostToDevice), "cudaMemcpy");
    cuda_check(cudaMemset(y_on_device.data, 0xff, y.num_bytes()), "cudaMemset");  // NaN
    cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    graph.launch();
    fetch(y_on_device, y);
    for (std::int64_t p = 0; p < places; ++p) EXPECT_EQ(std::isnan(y.at(p, 5)), p % 256 >= now[p / 256]) << p;
  }
}

// float8 numbers and their scales, [rows, columns] with a scale for `block_rows` x 128 of them.
struct ScaledNumbers {
  ScaledNumbers(SeededRandom& random, std::int64_t of_rows, std::int64_t of_columns, std::int64_t of_block_rows)
      : rows(of_rows), columns(of_columns), block_rows(of_block_rows), scale_columns((columns + 127) / 128) {
    for (std::int64_t i = 0; i < rows * columns; ++i)
      values.push_back(float_to_float8_e4m3(static_cast<float>(random.between(-1000, 1000)) / 8.0F));
    for (std::int64_t i = 0; i < (rows + block_rows - 1) / block_rows * scale_columns; ++i) {
      scales.push_back(static_cast<float>(random.between(100, 1000)) / 50000.0F);
    }
  }
  void spoil_row(std::int64_t row) {
    constexpr std::uint8_t kNan = 0x7f;
    std::fill_n(values.begin() + row * columns, columns, kNan);
    std::fill_n(scales.begin() + row * scale_columns, scale_columns, std::numeric_limits<float>::quiet_NaN());
  }
  double at(std::int64_t row, std::int64_t column) const {
    return static_cast<double>(float8_e4m3_to_float(values[static_cast<std::size_t>(row * columns + column)])) *
           scales[static_cast<std::size_t>(row / block_rows * scale_columns + column / 128)];
  }
  std::int64_t rows, columns, block_rows, scale_columns;
  std::vector<std::uint8_t> values;
  std::vector<float> scales;
};

TEST_F(DeviceExpertsTest, ScaledProductsAreTheirDefinitions) {
  SeededRandom random;
  DeviceExperts experts({.device = 0});
  for (int round = 0; round < 8; ++round) {
    const Case c = testing::random_case(random, 200);
    const std::int64_t outputs = 8 * random.between(1, 40), inputs = 16 * random.between(1, 40), num = c.experts();
    SCOPED_TRACE(c.describe() + "outputs " + std::to_string(outputs) + " inputs " + std::to_string(inputs));
    ScaledNumbers x(random, c.num_rows, inputs, 1);
    for (std::int64_t r = 0; r < c.num_rows; ++r) {
      if (!c.is_read[static_cast<std::size_t>(r)]) x.spoil_row(r);
    }
    const std::int64_t blocks = (outputs + 127) / 128;
    std::vector<ScaledNumbers> w;  // a matrix for each expert
    std::vector<std::uint8_t> w_values;
    std::vector<float> w_scales;
    for (std::int64_t g = 0; g < num; ++g) {
      w.emplace_back(random, outputs, inputs, 128);
      w_values.insert(w_values.end(), w.back().values.begin(), w.back().values.end());
      w_scales.insert(w_scales.end(), w.back().scales.begin(), w.back().scales.end());
    }
    const Dtype dtype = round % 2 == 0 ? Dtype::bfloat16 : Dtype::float16;
    const Buffer bias = Buffer::random(random, dtype, num, outputs);
    Uploads upload;
    Buffer y = Buffer::nan(dtype, c.groups.places, outputs, 8);
    const TensorView y_on_device = upload(y);
    const auto view = [](const ConstTensorView& flat, std::initializer_list<std::int64_t> shape) {
      return ConstTensorView(flat.data, flat.dtype, shape);
    };
    const DeviceExperts::Scaled rows = {view(upload.numbers(x.values, Dtype::float8_e4m3), {c.num_rows, inputs}),
                                        view(upload.numbers(x.scales, Dtype::float32), {c.num_rows, x.scale_columns})};
    const DeviceExperts::Scaled weights = {view(upload.numbers(w_values, Dtype::float8_e4m3), {num, outputs, inputs}),
                                           view(upload.numbers(w_scales, Dtype::float32), {num, blocks, x.scale_columns})};
    experts.grouped_gemm_scaled(rows, upload(c.groups), weights, upload(bias), y_on_device, nullptr);
    fetch(y_on_device, y);
    expect_near(
        y, c.groups,
        [&](int g, std::int64_t p, std::int64_t o) {
          double sum = bias.at(g, o);
          for (std::int64_t i = 0; i < inputs; ++i) sum += x.at(c.row(p), i) * w[static_cast<std::size_t>(g)].at(o, i);
          return sum;
        },
        "y");
  }
}

TEST_F(DeviceExpertsTest, OnlyPaddingIsCleared) {
  struct Layout {
    std::vector<std::int32_t> counts, begins;  // begins empty: capacity
    std::int64_t capacity, places;
  };
  const Layout layouts[] = {{{3, 0, 2, 0, 4}, {1, 5, 5, 9, 10}, 0, 17}, {{0, 4, 1}, {}, 4, 12}, {{0, 0}, {0, 0}, 0, 5}, {{6}, {0}, 0, 6}};
  for (const Layout& layout : layouts) {
    std::vector<bool> is_padding(static_cast<std::size_t>(layout.places), true);
    for (std::size_t g = 0; g < layout.counts.size(); ++g) {
      const std::int64_t begin = layout.begins.empty() ? static_cast<std::int64_t>(g) * layout.capacity : layout.begins[g];
      for (std::int64_t i = 0; i < layout.counts[g]; ++i) is_padding[static_cast<std::size_t>(begin + i)] = false;
    }
    for (const auto& [dtype, columns] : {std::pair{Dtype::bfloat16, 16}, {Dtype::bfloat16, 7}, {Dtype::float32, 300}}) {
      Uploads upload;
      DeviceRowGroups groups = {
          .places = layout.places, .counts = upload.numbers(layout.counts, Dtype::int32), .capacity = layout.capacity};
      if (!layout.begins.empty()) groups.begins = upload.numbers(layout.begins, Dtype::int32);
      Buffer host = Buffer::filled(dtype, layout.places, columns, 7.0F);
      const TensorView rows = upload(host);
      DeviceExperts({.device = 0}).clear_padding(groups, rows, nullptr);
      fetch(rows, host);
      for (std::int64_t place = 0; place < layout.places; ++place) {
        for (std::int64_t c = 0; c < columns; ++c) {
          ASSERT_EQ(host.at(place, c), is_padding[static_cast<std::size_t>(place)] ? 0.0 : 7.0) << place << ", " << c;
        }
      }
    }
  }
}

TEST_F(DeviceExpertsTest, WrongArgumentsAreNamed) {
  Uploads upload;
  DeviceExperts experts({.device = 0});
  const TensorView x = upload(Buffer::filled(Dtype::bfloat16, 4, 8, 1.0F)), y = upload(Buffer::filled(Dtype::bfloat16, 4, 16, 1.0F));
  const TensorView w = shaped(upload(Buffer::filled(Dtype::bfloat16, 2 * 16, 8, 1.0F)), {2, 16, 8});
  const ConstTensorView counts = upload.numbers<std::int32_t>({1, 1}, Dtype::int32);
  const DeviceRowGroups groups = {.places = 4, .counts = counts, .capacity = 2};
  expect_usage_error(
      [&] {
        experts.grouped_gemm(x, groups, shaped(w, {2, 8, 16}), {}, y, nullptr);
      },
      {"w is [2, 8, 16] bfloat16", "[2, 8, 8]"});
  expect_usage_error([&] { experts.grouped_gemm(x, groups, w, {}, x, nullptr); }, {"y is [4, 8]", "[4, 16]"});
  DeviceRowGroups wrong = groups;
  wrong.capacity = 3;
  expect_usage_error([&] { experts.grouped_gemm(x, wrong, w, {}, y, nullptr); }, {"capacity 3", "have 6 places", "have 4"});
  wrong = groups;
  wrong.counts = {counts.data, Dtype::int64, {2}};
  expect_usage_error([&] { experts.grouped_gemm(x, wrong, w, {}, y, nullptr); }, {"counts is [2] int64", "int32"});
  expect_usage_error([&] { experts.permute(x, groups, y, nullptr); }, {"groups have no rows"});
  expect_usage_error([&] { experts.clear_padding(groups, w, nullptr); }, {"rows are [2, 16, 8] bfloat16", "[4,M]"});
  expect_usage_error([&] { experts.grouped_gemm_scaled({x, x}, groups, {w, w}, {}, y, nullptr); }, {"x is [4, 8] bfloat16", "float8_e4m3"});
  expect_usage_error([] { DeviceExperts({.device = 0, .sm_margin = 1 << 20}); }, {"sm_margin = 1048576"});
  expect_usage_error([] { DeviceExperts({.device = 4096}); }, {"device = 4096"});
}

}  // namespace
}  // namespace tokenyard::device_test
