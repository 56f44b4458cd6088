// The public quantise and dequantise: arguments checked, then row by row.

#include "core/usage.h"
#include "kernels/cpu/kernels.h"

namespace tokenyard {
namespace {

void require(bool ok, const char* name, const ConstTensorView& given, const std::string& expected) {
  if (!ok) usage_error("{} is {}; expected {}", name, describe(given), expected);
}

// What the three tensors of either direction have in common. `x` has the wide elements.
void check(const ConstTensorView& x, const ConstTensorView& q, const ConstTensorView& scales, ScaleFormat format) {
  const bool is_float = x.dtype == Dtype::bfloat16 || x.dtype == Dtype::float16 || x.dtype == Dtype::float32;
  require(x.ndim == 2 && is_float && x.rows_contiguous(), "x", x,
          "[tokens, hidden_size] bfloat16, float16 or float32 with contiguous rows");
  const bool same = q.ndim == 2 && q.shape[0] == x.shape[0] && q.shape[1] == x.shape[1];
  require(same && q.dtype == Dtype::float8_e4m3 && q.rows_contiguous(), "q", q,
          fmt::format("[{}, {}] float8_e4m3 with contiguous rows", x.shape[0], x.shape[1]));
  const Dtype scale_dtype = format == ScaleFormat::ue8m0 ? Dtype::int32 : Dtype::float32;
  const std::int64_t columns = scale_columns(x.shape[1], format);
  require(scales.ndim == 2 && scales.shape[0] == x.shape[0] && scales.shape[1] == columns && scales.dtype == scale_dtype, "scales", scales,
          fmt::format("[{}, {}] {}", x.shape[0], columns, name(scale_dtype)));
  if (x.num_elements() > 0 && !(x.data && q.data && scales.data)) {
    usage_error("x at {}, q at {}, scales at {}; expected memory for each", x.data, q.data, scales.data);
  }
}

}  // namespace

std::int64_t scale_columns(std::int64_t hidden_size, ScaleFormat format) {
  const std::int64_t blocks = (hidden_size + kQuantiseBlock - 1) / kQuantiseBlock;
  return format == ScaleFormat::ue8m0 ? (blocks + 3) / 4 : blocks;
}

void quantise(const ConstTensorView& x, const TensorView& q, const TensorView& scales, ScaleFormat format) {
  check(x, q, scales, format);
  for (std::int64_t t = 0; t < x.shape[0]; ++t) {
    cpu::quantise_row({.x = x.row(t),
                       .dtype = x.dtype,
                       .elements = x.shape[1],
                       .format = format,
                       .q = reinterpret_cast<std::uint8_t*>(q.row(t)),
                       .scales = scales.row(t),
                       .scale_stride = scales.strides[1] * size_of(scales.dtype)});
  }
}

void dequantise(const ConstTensorView& q, const ConstTensorView& scales, const TensorView& x, ScaleFormat format) {
  check(x, q, scales, format);
  for (std::int64_t t = 0; t < x.shape[0]; ++t) {
    cpu::dequantise_row({.q = reinterpret_cast<const std::uint8_t*>(q.row(t)),
                         .scales = scales.row(t),
                         .scale_stride = scales.strides[1] * size_of(scales.dtype),
                         .format = format,
                         .elements = x.shape[1],
                         .x = x.row(t),
                         .dtype = x.dtype});
  }
}

}  // namespace tokenyard
