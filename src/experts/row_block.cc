#include "experts/row_block.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/usage.h"
#include "kernels/cpu/kernels.h"

namespace tokenyard::experts_internal {
namespace {

bool is_dense(const ConstTensorView& view) {
  return view.rows_contiguous() && (view.shape[0] <= 1 || view.strides[0] * view.shape[0] == view.num_elements());
}

bool is_floating(Dtype dtype) { return dtype == Dtype::float32 || dtype == Dtype::bfloat16 || dtype == Dtype::float16; }

bool has_shape(const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
  return view.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), view.shape.begin());
}

std::string text_of(std::initializer_list<std::int64_t> shape) {
  std::string text;
  for (const std::int64_t size : shape) text += fmt::format("{}{}", text.empty() ? "[" : ", ", size);
  return text + "]";
}

// Last in, first out: nested tensors find what they had before.
std::vector<std::vector<float>>& idle_scratch() {
  thread_local std::vector<std::vector<float>> idle;
  return idle;
}

std::string given(const ConstTensorView& view) { return view ? describe(view) : "absent"; }

}  // namespace

void to_float(const std::byte* from, Dtype dtype, std::int64_t count, float* to) {
  if (count == 0) return;  // of no rows, the address may be null
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  const auto* halves = reinterpret_cast<const std::uint16_t*>(from);
  if (dtype == Dtype::bfloat16) {  // its bits are the upper half of a float's
    for (std::int64_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(static_cast<std::uint32_t>(halves[i]) << 16);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) to[i] = float16_to_float(halves[i]);
}

void from_float(const float* from, Dtype dtype, std::int64_t count, std::byte* to) {
  if (count == 0) return;
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  auto* halves = reinterpret_cast<std::uint16_t*>(to);
  const auto round = dtype == Dtype::bfloat16 ? float_to_bfloat16 : float_to_float16;
  for (std::int64_t i = 0; i < count; ++i) halves[i] = round(from[i]);
}

const float* read_rows(const ConstTensorView& x, const RowGroups& groups, Places places, std::vector<float>& scratch) {
  if (groups.rows.empty()) return read_places(x, places, scratch);
  const std::int64_t columns = x.shape[1];
  scratch.resize(static_cast<std::size_t>(places.count * columns));
  for (std::int64_t i = 0; i < places.count; ++i) {
    to_float(x.row(groups.rows[static_cast<std::size_t>(places.begin + i)]), x.dtype, columns, scratch.data() + i * columns);
  }
  return scratch.data();
}

const float* read_places(const ConstTensorView& y, Places places, std::vector<float>& scratch) {
  const std::int64_t columns = y.shape[1];
  if (y.dtype == Dtype::float32 && y.strides[0] == columns) return reinterpret_cast<const float*>(y.row(places.begin));
  scratch.resize(static_cast<std::size_t>(places.count * columns));
  for (std::int64_t i = 0; i < places.count; ++i) to_float(y.row(places.begin + i), y.dtype, columns, scratch.data() + i * columns);
  return scratch.data();
}

void write_places(const std::vector<float>& values, Places places, const TensorView& y) {
  const std::int64_t columns = y.shape[1];
  for (std::int64_t i = 0; i < places.count; ++i) from_float(values.data() + i * columns, y.dtype, columns, y.row(places.begin + i));
}

GroupTensor::GroupTensor(const ConstTensorView& tensor, const ConstTensorView& scales) : tensor_(tensor), scales_(scales) {
  if (idle_scratch().empty()) return;
  scratch_ = std::move(idle_scratch().back());
  idle_scratch().pop_back();
}

GroupTensor::~GroupTensor() { idle_scratch().push_back(std::move(scratch_)); }

const float* GroupTensor::of(std::int64_t group) {
  const std::int64_t elements = tensor_.num_elements() / tensor_.shape[0];
  const std::byte* from = static_cast<const std::byte*>(tensor_.data) + group * elements * size_of(tensor_.dtype);
  if (tensor_.dtype == Dtype::float32) return reinterpret_cast<const float*>(from);
  if (held_ != group) {
    if (std::ssize(scratch_) < elements) scratch_.resize(static_cast<std::size_t>(elements));
    widen(group, elements, from);
    held_ = group;
  }
  return scratch_.data();
}

void GroupTensor::widen(std::int64_t group, std::int64_t elements, const std::byte* from) {
  if (tensor_.dtype != Dtype::float8_e4m3) return to_float(from, tensor_.dtype, elements, scratch_.data());
  const std::int64_t columns = tensor_.shape[tensor_.ndim - 1], blocks = scales_.shape[scales_.ndim - 1];
  const float* scales = scales_.as<float>() + group * (scales_.num_elements() / scales_.shape[0]);
  for (std::int64_t row = 0; row * columns < elements; ++row) {
    cpu::dequantise_row({.q = reinterpret_cast<const std::uint8_t*>(from) + row * columns,
                         .scales = reinterpret_cast<const std::byte*>(scales + row / kQuantiseBlock * blocks),
                         .elements = columns,
                         .x = scratch_.data() + row * columns});
  }
}

void check_groups(const RowGroups& groups) {
  if (groups.begins.size() != groups.counts.size()) {
    usage_error("groups have {} begins and {} counts; both are one per local expert", groups.begins.size(), groups.counts.size());
  }
  if (!groups.rows.empty() && std::ssize(groups.rows) != groups.places) {
    usage_error("groups have {} rows for {} places; give one per place, or none", groups.rows.size(), groups.places);
  }
  for (std::size_t g = 0; g < groups.counts.size(); ++g) {
    if (groups.begins[g] < 0 || groups.counts[g] < 0 || groups.begins[g] > groups.places - groups.counts[g]) {
      usage_error("group {} has places {} to {}, and there are {}", g, groups.begins[g], groups.begins[g] + groups.counts[g],
                  groups.places);
    }
  }
}

void check_rows(const char* what, const ConstTensorView& view, std::int64_t rows, std::int64_t columns) {
  const bool fits =
      view.ndim == 2 && view.shape[0] == rows && view.shape[1] == columns && is_floating(view.dtype) && view.rows_contiguous();
  if (!fits || (view.data == nullptr && rows > 0)) {
    usage_error("{} is {}; expected [{}, {}] float32, bfloat16 or float16 with contiguous rows", what, given(view), rows, columns);
  }
}

void check_dense(const char* what, const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
  if (!has_shape(view, shape) || !is_floating(view.dtype) || !is_dense(view)) {
    usage_error("{} is {}; expected {} float32, bfloat16 or float16, dense", what, given(view), text_of(shape));
  }
}

void check_float32(const char* what, const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
  if (!has_shape(view, shape) || view.dtype != Dtype::float32 || !is_dense(view)) {
    usage_error("{} is {}; expected {} float32, dense", what, given(view), text_of(shape));
  }
}

void check_input(const ConstTensorView& x, const RowGroups& groups) {
  check_groups(groups);
  if (x.ndim != 2) usage_error("x is {}; expected [rows, hidden_size]", given(x));
  const bool is_by_place = groups.rows.empty() && groups.places > 0;  // without places, any rows will do: none is read
  check_rows("x", x, is_by_place ? groups.places : x.shape[0], x.shape[1]);
  if (groups.rows.empty()) return;
  for (std::size_t g = 0; g < groups.counts.size(); ++g) {
    for (std::int64_t p = groups.begins[g]; p < groups.begins[g] + groups.counts[g]; ++p) {
      const std::int64_t row = groups.rows[static_cast<std::size_t>(p)];
      if (row < 0 || row >= x.shape[0]) usage_error("place {} is row {}, and x has {}", p, row, x.shape[0]);
    }
  }
}

bool is_float8(const ExpertWeights& weights) { return weights.w13.dtype == Dtype::float8_e4m3; }

namespace {

void check_float8(const char* what, const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
  if (!has_shape(view, shape) || view.dtype != Dtype::float8_e4m3 || !is_dense(view))
    usage_error("{} is {} beside float8_e4m3 weights; expected {} float8_e4m3, dense", what, given(view), text_of(shape));
}

}  // namespace

void check_products(const ExpertWeights& weights, const ExpertSizes& sizes) {
  const auto [experts, width, hidden] = sizes;
  if (!is_float8(weights)) {
    check_dense("w13", weights.w13, {experts, 2, width, hidden});
    check_dense("w2", weights.w2, {experts, hidden, width});
    if (weights.w13_scale || weights.w2_scale) {
      usage_error("w13_scale is {} and w2_scale {}, and w13 is {}; scales are of float8_e4m3 weights: give none", given(weights.w13_scale),
                  given(weights.w2_scale), given(weights.w13));
    }
    return;
  }
  constexpr std::int64_t kAlignment = 16;
  if (width % kQuantiseBlock != 0 || hidden % kAlignment != 0) {
    usage_error(
        "w13 is {}: the width is {} and hidden_size {}; expected a multiple of {}, so that no scale is of two projections or shards, "
        "and of {}: cut experts into fewer shards, or widen the weights",
        given(weights.w13), width, hidden, kQuantiseBlock, kAlignment);
  }
  const std::int64_t width_blocks = width / kQuantiseBlock, hidden_blocks = (hidden + kQuantiseBlock - 1) / kQuantiseBlock;
  check_float8("w13", weights.w13, {experts, 2, width, hidden});
  check_float8("w2", weights.w2, {experts, hidden, width});
  check_float32("w13_scale", weights.w13_scale, {experts, 2, width_blocks, hidden_blocks});
  check_float32("w2_scale", weights.w2_scale, {experts, hidden_blocks, width_blocks});
}

void check_differentiable(const ExpertWeights& weights) {
  if (!is_float8(weights)) return;
  usage_error(
      "w13 is {}; weights that have gradients are float32, bfloat16 or float16: float8_e4m3 goes forward only, without activations "
      "for backward; widen the weights to train",
      given(weights.w13));
}

}  // namespace tokenyard::experts_internal
