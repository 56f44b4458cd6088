#include "tokenyard/device_experts.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>

#include "core/usage.h"
#include "exchange/handle_facts.h"
#include "experts/cuda/products.h"
#include "experts/row_block.h"
#include "memory/cuda_error.h"
#include "memory/cuda_handle.h"

namespace tokenyard {

using namespace experts_internal;  // NOLINT(google-build-using-namespace): this file is a part of it
namespace kernels = experts_cuda;
using kernels::GroupedArgs;
using kernels::Product;
using kernels::Scratch;

struct DeviceExperts::State {
  State(int of_device, int sm_margin) : device(of_device), products(of_device, sm_margin) {}
  int device;
  kernels::Products products;
};

namespace {

kernels::Stream stream_of(void* stream) { return static_cast<kernels::Stream>(stream); }
const std::byte* data_of(const ConstTensorView& view) { return static_cast<const std::byte*>(view.data); }
std::byte* data_of(const TensorView& view) { return static_cast<std::byte*>(view.data); }
std::int64_t size_at(const ConstTensorView& view, int dimension) { return view.ndim > dimension ? view.shape[dimension] : 0; }
// A tensor of one row may have any stride.
std::int64_t stride_of(const ConstTensorView& view) { return view.shape[0] > 1 ? view.strides[0] : view.shape[1]; }

void check_table(const char* what, const ConstTensorView& table, std::int64_t at_least) {
  const bool fits = table.ndim >= 1 && table.dtype == Dtype::int32 && table.num_elements() >= at_least && table.rows_contiguous();
  if (!fits || (table.data == nullptr && at_least > 0)) {
    usage_error("{} is {}; expected at least {} dense int32 in device memory", what, table ? describe(table) : "absent", at_least);
  }
}

kernels::Groups groups_of(const DeviceRowGroups& groups) {
  if (groups.places < 0 || groups.capacity < 0 || groups.places > INT32_MAX) {
    usage_error("groups have {} places and a capacity of {}; both are in 0..2^31-1", groups.places, groups.capacity);
  }
  if (groups.counts.ndim != 1) usage_error("counts are {}; expected [experts] int32", groups.counts ? describe(groups.counts) : "absent");
  const std::int64_t num_groups = groups.counts.shape[0];
  check_table("counts", groups.counts, num_groups);
  if (groups.begins) check_table("begins", groups.begins, num_groups);
  if (!groups.begins && num_groups * groups.capacity != groups.places) {
    usage_error("without begins, {} experts of capacity {} have {} places, and groups have {}; give begins or the capacity", num_groups,
                groups.capacity, num_groups * groups.capacity, groups.places);
  }
  if (groups.rows) check_table("rows", groups.rows, groups.places);
  return {.begins = groups.begins.as<std::int32_t>(),
          .counts = groups.counts.as<std::int32_t>(),
          .capacity = groups.capacity,
          .places = groups.places,
          .num_groups = static_cast<int>(num_groups),
          .likely = groups.likely};
}

const std::int32_t* rows_of(const DeviceRowGroups& groups) { return groups.rows ? groups.rows.as<std::int32_t>() : nullptr; }

// The rows that a product reads.
void check_input(const ConstTensorView& x, const DeviceRowGroups& groups) {
  if (x.ndim != 2) usage_error("x is {}; expected [rows, hidden_size]", x ? describe(x) : "absent");
  const bool is_by_place = !groups.rows && groups.places > 0;  // without places, any rows will do: none is read
  check_rows("x", x, is_by_place ? groups.places : x.shape[0], x.shape[1]);
}

void check_columns(const char* what, std::int64_t columns) {
  if (columns < 1 || columns > INT32_MAX / 2) usage_error("{} has {} columns; a product needs at least one", what, columns);
}

void check_same_dtype(const char* a_name, const ConstTensorView& a, const char* b_name, const ConstTensorView& b) {
  if (b && a.dtype != b.dtype) usage_error("{} is {} and {} {}; use one dtype", a_name, describe(a), b_name, describe(b));
}

// Rows x of a product: gathered, or by place.
GroupedArgs product_of(Product product, const ConstTensorView& x, const DeviceRowGroups& groups, bool is_gathered) {
  return {.product = product,
          .dtype = x.dtype,
          .groups = groups_of(groups),
          .k = static_cast<int>(x.shape[1]),
          .x = data_of(x),
          .x_stride = stride_of(x),
          .x_rows = is_gathered ? rows_of(groups) : nullptr,
          .num_rows = x.shape[0]};
}

// Of forward, x w^T, and of dgrad, dy w.
GroupedArgs rows_args(Product product, const ConstTensorView& x, const DeviceRowGroups& groups, bool is_gathered, const ConstTensorView& w,
                      const TensorView& y) {
  GroupedArgs args = product_of(product, x, groups, is_gathered);
  args.n = static_cast<int>(y.shape[1]);
  args.w = data_of(w);
  args.y = data_of(y);
  args.y_stride = stride_of(y);
  return args;
}

GroupedArgs wgrad_args(const ConstTensorView& dy, const ConstTensorView& x, const DeviceRowGroups& groups, bool is_gathered,
                       const TensorView& dw) {
  GroupedArgs args = product_of(Product::wgrad, x, groups, is_gathered);
  args.n = static_cast<int>(dy.shape[1]);
  args.w = data_of(dy);
  args.w_stride = stride_of(dy);
  args.y = data_of(dw);
  return args;
}

// A dense matrix in scratch memory.
TensorView matrix(Scratch& scratch, Scratch::Kind kind, Dtype dtype, std::int64_t rows, std::int64_t columns, kernels::Stream stream) {
  return {scratch.take(kind, rows * columns * size_of(dtype), stream), dtype, {rows, columns}};
}

ExpertSizes check_weights(const ConstTensorView& x, const DeviceRowGroups& groups, const ExpertWeights& weights) {
  check_input(x, groups);
  const ExpertSizes sizes = {groups.counts.shape[0], weights.w13.ndim == 4 ? weights.w13.shape[2] : 0, x.shape[1]};
  check_columns("x", sizes.hidden);
  check_products(weights, sizes);
  check_columns("w2", sizes.width);
  if (weights.w13_bias) check_dense("w13_bias", weights.w13_bias, {sizes.experts, 2, sizes.width});
  if (weights.w2_bias) check_dense("w2_bias", weights.w2_bias, {sizes.experts, sizes.hidden});
  check_same_dtype("x", x, "w13", weights.w13);
  check_same_dtype("x", x, "w2", weights.w2);
  check_same_dtype("x", x, "w13_bias", weights.w13_bias);
  check_same_dtype("x", x, "w2_bias", weights.w2_bias);
  return sizes;
}

void check_gate_up(const ConstTensorView& gate_up, const ConstTensorView& x, std::int64_t places, std::int64_t width) {
  check_dense("gate_up", gate_up, {places, 2 * width});
  check_same_dtype("x", x, "gate_up", gate_up);
}

void check_gradients(const ExpertSizes& s, const ExpertWeights& weights, const ExpertGradients& gradients) {
  check_float32("gradients.w13", gradients.w13, {s.experts, 2, s.width, s.hidden});
  check_float32("gradients.w2", gradients.w2, {s.experts, s.hidden, s.width});
  if (weights.w13_bias) check_float32("gradients.w13_bias", gradients.w13_bias, {s.experts, 2, s.width});
  if (weights.w2_bias) check_float32("gradients.w2_bias", gradients.w2_bias, {s.experts, s.hidden});
}

void check_launch(const char* what) { cuda_check(cudaGetLastError(), what); }

}  // namespace

DeviceRowGroups DeviceRowGroups::of(const Received& received) {
  DeviceRowGroups groups;
  groups.counts = received.expert_counts();
  groups.likely = std::max<std::int64_t>(1, received.handle().num_tokens() * received.handle().state()->top_k());
  const TensorView rows = received.rows();
  switch (received.handle().layout()) {
    case Layout::expert_major:
      groups.begins = received.expert_offsets();
      groups.places = rows.shape[0];
      return groups;
    case Layout::expert_padded:
      groups.capacity = rows.shape[1];
      groups.places = rows.shape[0] * rows.shape[1];
      return groups;
    case Layout::token_major:
      if (received.expert_rows()) {
        groups.begins = received.expert_offsets();
        groups.rows = received.expert_rows();
        groups.places = groups.rows.num_elements();
        return groups;
      }
      [[fallthrough]];
    default:
      usage_error(
          "these rows have no map from experts to rows; dispatch token_major with gather_map, or pass local_ids to DeviceExperts::gather");
  }
}

DeviceExperts::DeviceExperts(const DeviceExpertsOptions& options) {
  int device = options.device;
  int count = 0;
  cuda_check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (device < 0) cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= count) usage_error("device = {}, and there are {} GPUs; choose one below that", device, count);
  state_ = std::make_unique<State>(device, options.sm_margin);
}
DeviceExperts::~DeviceExperts() = default;
DeviceExperts::DeviceExperts(DeviceExperts&&) noexcept = default;
DeviceExperts& DeviceExperts::operator=(DeviceExperts&&) noexcept = default;

DeviceRowGroups DeviceExperts::gather(const ConstTensorView& local_ids, int num_local_experts, void* stream) {
  if (num_local_experts < 0) usage_error("num_local_experts = {}; it is not negative", num_local_experts);
  check_table("local_ids", local_ids, local_ids.num_elements());
  if (local_ids.num_elements() > INT32_MAX) usage_error("local_ids are {}; at most 2^31-1 fit", describe(local_ids));
  const std::int64_t num_ids = local_ids.num_elements();
  const CudaDeviceScope scope(state_->device);
  const std::int64_t numbers = 2 * std::int64_t{num_local_experts} + num_ids;
  auto* tables = reinterpret_cast<std::int32_t*>(
      state_->products.scratch().take(Scratch::gathered, numbers * static_cast<std::int64_t>(sizeof(std::int32_t)), stream_of(stream)));
  const kernels::GatherArgs args = {.local_ids = local_ids.as<std::int32_t>(),
                                    .num_ids = num_ids,
                                    .top_k = static_cast<int>(std::max<std::int64_t>(1, local_ids.shape[local_ids.ndim - 1])),
                                    .num_groups = num_local_experts,
                                    .counts = tables,
                                    .begins = tables + num_local_experts,
                                    .rows = tables + 2 * std::int64_t{num_local_experts}};
  kernels::gather_groups(args, stream_of(stream));
  check_launch("launch of a gather");
  return {.places = num_ids,
          .counts = {args.counts, Dtype::int32, {num_local_experts}},
          .begins = {args.begins, Dtype::int32, {num_local_experts}},
          .rows = {args.rows, Dtype::int32, {num_ids}}};
}

void DeviceExperts::grouped_gemm(const ConstTensorView& x, const DeviceRowGroups& groups, const ConstTensorView& w,
                                 const ConstTensorView& bias, const TensorView& y, void* stream) {
  check_input(x, groups);
  const std::int64_t outputs = size_at(w, 1);
  const std::int64_t num_groups = size_at(groups.counts, 0);
  check_dense("w", w, {num_groups, outputs, x.shape[1]});
  if (bias) check_dense("bias", bias, {num_groups, outputs});
  check_rows("y", y, groups.places, outputs);
  check_columns("x", x.shape[1]);
  check_columns("y", outputs);
  check_same_dtype("x", x, "w", w);
  check_same_dtype("x", x, "bias", bias);
  check_same_dtype("x", x, "y", y);
  const CudaDeviceScope scope(state_->device);
  GroupedArgs args = rows_args(Product::forward, x, groups, true, w, y);
  args.bias = data_of(bias);
  state_->products.run(args, stream_of(stream));
  check_launch("launch of grouped_gemm");
}

namespace {

using Scaled = DeviceExperts::Scaled;

void check_scaled(const char* what, const ConstTensorView& view, Dtype dtype, std::initializer_list<std::int64_t> shape) {
  std::string text;
  for (const std::int64_t size : shape) text += fmt::format("{}{}", text.empty() ? "" : ", ", size);
  const bool has_shape = view.ndim == static_cast<int>(shape.size()) && std::equal(shape.begin(), shape.end(), view.shape.begin());
  const bool is_dense =
      has_shape && view.rows_contiguous() && (view.shape[0] <= 1 || view.strides[0] * view.shape[0] == view.num_elements());
  if (!is_dense || view.dtype != dtype) {
    usage_error("{} is {}; expected [{}] {}, dense", what, view ? describe(view) : "absent", text, name(dtype));
  }
}

void check_half(const char* what, const ConstTensorView& view) {
  if (view.dtype != Dtype::bfloat16 && view.dtype != Dtype::float16)
    usage_error("{} is {}; with float8_e4m3 weights it is bfloat16 or float16", what, describe(view));
}

// A product of float8 numbers, checked.
kernels::ScaledArgs scaled_args(const Scaled& x, const DeviceRowGroups& groups, const Scaled& w, const ConstTensorView& bias,
                                const TensorView& y) {
  const std::int64_t num_groups = size_at(groups.counts, 0), outputs = size_at(w.values, 1), inputs = size_at(w.values, 2);
  const bool is_by_place = !groups.rows && groups.places > 0;  // without places, any rows will do: none is read
  const std::int64_t num_rows = is_by_place ? groups.places : size_at(x.values, 0);
  const auto blocks = [](std::int64_t elements) { return kernels::scale_blocks(elements); };
  check_scaled("x", x.values, Dtype::float8_e4m3, {num_rows, inputs});
  check_scaled("x's scales", x.scales, Dtype::float32, {num_rows, blocks(inputs)});
  check_scaled("w", w.values, Dtype::float8_e4m3, {num_groups, outputs, inputs});
  check_scaled("w's scales", w.scales, Dtype::float32, {num_groups, blocks(outputs), blocks(inputs)});
  check_rows("y", y, groups.places, outputs);
  check_half("y", y);
  if (bias) check_scaled("bias", bias, y.dtype, {num_groups, outputs});
  check_columns("x", inputs);
  check_columns("y", outputs);
  const auto addresses = reinterpret_cast<std::uintptr_t>(x.values.data) | reinterpret_cast<std::uintptr_t>(w.values.data) |
                         reinterpret_cast<std::uintptr_t>(y.data) | reinterpret_cast<std::uintptr_t>(bias.data);
  if (inputs % 16 != 0 || outputs % 8 != 0 || stride_of(y) % 8 != 0 || addresses % 16 != 0) {
    usage_error(
        "x is {}, w {} and y {}; expected rows of x of a multiple of 16 elements, of y of a multiple of 8, and addresses that are "
        "multiples of 16",
        describe(x.values), describe(w.values), describe(y));
  }
  kernels::ScaledArgs args;
  args.hopper.grouped = rows_args(Product::forward, x.values, groups, true, w.values, y);
  args.hopper.grouped.bias = data_of(bias);
  args.out = y.dtype;
  args.x_scales = x.scales.as<float>();
  args.w_scales = w.scales.as<float>();
  return args;
}

}  // namespace

void DeviceExperts::grouped_gemm_scaled(const Scaled& x, const DeviceRowGroups& groups, const Scaled& w, const ConstTensorView& bias,
                                        const TensorView& y, void* stream) {
  const kernels::ScaledArgs args = scaled_args(x, groups, w, bias, y);
  const CudaDeviceScope scope(state_->device);
  state_->products.run_scaled(args, stream_of(stream));
  check_launch("launch of grouped_gemm_scaled");
}

void DeviceExperts::grouped_gemm_dgrad(const ConstTensorView& dy, const DeviceRowGroups& groups, const ConstTensorView& w,
                                       const TensorView& dx, void* stream) {
  const std::int64_t outputs = size_at(w, 1);
  const std::int64_t inputs = size_at(w, 2);
  check_dense("w", w, {size_at(groups.counts, 0), outputs, inputs});
  check_rows("dy", dy, groups.places, outputs);
  check_rows("dx", dx, groups.places, inputs);
  check_columns("dy", outputs);
  check_columns("dx", inputs);
  check_same_dtype("dy", dy, "w", w);
  check_same_dtype("dy", dy, "dx", dx);
  const CudaDeviceScope scope(state_->device);
  state_->products.run(rows_args(Product::dgrad, dy, groups, false, w, dx), stream_of(stream));
  check_launch("launch of grouped_gemm_dgrad");
}

void DeviceExperts::grouped_gemm_wgrad(const ConstTensorView& dy, const ConstTensorView& x, const DeviceRowGroups& groups,
                                       const TensorView& dw, void* stream) {
  check_input(x, groups);
  const std::int64_t outputs = size_at(dw, 1);
  check_float32("dw", dw, {size_at(groups.counts, 0), outputs, x.shape[1]});
  check_rows("dy", dy, groups.places, outputs);
  check_columns("dy", outputs);
  check_columns("x", x.shape[1]);
  check_same_dtype("dy", dy, "x", x);
  const CudaDeviceScope scope(state_->device);
  state_->products.run(wgrad_args(dy, x, groups, true, dw), stream_of(stream));
  check_launch("launch of grouped_gemm_wgrad");
}

namespace {

// Float8 rows by place in scratch memory, and their scales.
struct QuantisedMatrix {
  TensorView values, scales;
  Scaled view() const { return {values, scales}; }
  kernels::QuantisedRows rows() const { return {data_of(values), scales.as<float>(), values.shape[1]}; }
};

// The feed-forward of float8 weights: rows that are not float8 yet become so, and the activation does.
struct Float8Forward {
  const DeviceExperts::Forward& input;
  const ExpertWeights& weights;
  const Activation& activation;
  const TensorView& y;

  ExpertSizes checked(const DeviceRowGroups& groups) const {
    const ConstTensorView& x = input.x;
    if (input.gate_up) check_differentiable(weights);
    if (x.ndim != 2) usage_error("x is {}; expected [rows, hidden_size]", x ? describe(x) : "absent");
    const ExpertSizes sizes = {size_at(groups.counts, 0), weights.w13.ndim == 4 ? weights.w13.shape[2] : 0, x.shape[1]};
    check_products(weights, sizes);
    check_rows("y", y, groups.places, sizes.hidden);
    check_half("y", y);
    if (weights.w13_bias) check_dense("w13_bias", weights.w13_bias, {sizes.experts, 2, sizes.width});
    if (x.dtype == Dtype::float8_e4m3) return sizes;
    check_input(x, groups);
    check_half("x", x);
    check_same_dtype("x", x, "y", y);
    if (input.x_scales)
      usage_error("x is {} and x_scales {}; scales are of float8_e4m3 rows: give none", describe(x), describe(input.x_scales));
    return sizes;
  }

  // As the first product takes them.
  Scaled rows(kernels::Products& products, DeviceRowGroups& groups, kernels::Stream on) const {
    const ConstTensorView& x = input.x;
    if (x.dtype == Dtype::float8_e4m3) return {x, input.x_scales};
    const std::int64_t places = groups.places, columns = x.shape[1];
    const QuantisedMatrix q = {matrix(products.scratch(), Scratch::rows, Dtype::float8_e4m3, places, columns, on),
                               matrix(products.scratch(), Scratch::scales, Dtype::float32, places, kernels::scale_blocks(columns), on)};
    kernels::quantise({.groups = groups_of(groups),
                       .rows = rows_of(groups),
                       .num_rows = x.shape[0],
                       .dtype = x.dtype,
                       .from = data_of(x),
                       .from_stride = stride_of(x),
                       .to = q.rows()},
                      products.num_sms(), on);
    groups.rows = {};
    return q.view();
  }

  void run(kernels::Products& products, DeviceRowGroups groups, kernels::Stream on) const {
    const auto [experts, width, hidden] = checked(groups);
    const std::int64_t places = groups.places;
    const auto as = [](const ConstTensorView& view, std::initializer_list<std::int64_t> shape) {
      return view ? ConstTensorView(view.data, view.dtype, shape) : view;
    };
    const Scaled w13 = {as(weights.w13, {experts, 2 * width, hidden}),
                        as(weights.w13_scale, {experts, 2 * kernels::scale_blocks(width), kernels::scale_blocks(hidden)})};
    const TensorView gate_up = matrix(products.scratch(), Scratch::gate_up, y.dtype, places, 2 * width, on);
    const Scaled x = rows(products, groups, on);
    products.run_scaled(scaled_args(x, groups, w13, as(weights.w13_bias, {experts, 2 * width}), gate_up), on);
    groups.rows = {};
    const QuantisedMatrix act = {matrix(products.scratch(), Scratch::act, Dtype::float8_e4m3, places, width, on),
                                 matrix(products.scratch(), Scratch::act_scales, Dtype::float32, places, kernels::scale_blocks(width), on)};
    kernels::activate_quantised({.groups = groups_of(groups),
                                 .activation = activation,
                                 .dtype = y.dtype,
                                 .width = static_cast<int>(width),
                                 .gate_up = data_of(gate_up)},
                                act.rows(), products.num_sms(), on);
    products.run_scaled(scaled_args(act.view(), groups, {weights.w2, weights.w2_scale}, weights.w2_bias, y), on);
  }
};

}  // namespace

void DeviceExperts::experts_forward(const Forward& input, const DeviceRowGroups& groups, const ExpertWeights& weights,
                                    const Activation& activation, const TensorView& y, void* stream) {
  if (is_float8(weights)) {
    const CudaDeviceScope scope(state_->device);
    Float8Forward{input, weights, activation, y}.run(state_->products, groups, stream_of(stream));
    return check_launch("launch of experts_forward");
  }
  const auto [experts, width, hidden] = check_weights(input.x, groups, weights);
  check_rows("y", y, groups.places, hidden);
  check_same_dtype("x", input.x, "y", y);
  if (input.gate_up) check_gate_up(input.gate_up, input.x, groups.places, width);
  const CudaDeviceScope scope(state_->device);
  kernels::Products& products = state_->products;
  const kernels::Stream on = stream_of(stream);
  const Dtype dtype = input.x.dtype;
  const TensorView gate_up =
      input.gate_up ? input.gate_up : matrix(products.scratch(), Scratch::gate_up, dtype, groups.places, 2 * width, on);
  const TensorView act = matrix(products.scratch(), Scratch::act, dtype, groups.places, width, on);
  GroupedArgs up = rows_args(Product::forward, input.x, groups, true, weights.w13, gate_up);
  up.bias = data_of(weights.w13_bias);
  products.run(up, on);
  kernels::activate({.groups = groups_of(groups),
                     .activation = activation,
                     .dtype = dtype,
                     .width = static_cast<int>(width),
                     .gate_up = data_of(gate_up),
                     .act = data_of(act)},
                    products.num_sms(), on);
  GroupedArgs down = rows_args(Product::forward, act, groups, false, weights.w2, y);
  down.bias = data_of(weights.w2_bias);
  products.run(down, on);
  check_launch("launch of experts_forward");
}

void DeviceExperts::experts_backward(const Backward& call, const DeviceRowGroups& groups, const ExpertWeights& weights,
                                     const Activation& activation, void* stream) {
  check_differentiable(weights);
  const ExpertSizes sizes = check_weights(call.x, groups, weights);
  const std::int64_t width = sizes.width;
  check_rows("dy", call.dy, groups.places, sizes.hidden);
  check_rows("dx", call.dx, groups.places, sizes.hidden);
  check_same_dtype("x", call.x, "dy", call.dy);
  check_same_dtype("x", call.x, "dx", call.dx);
  check_gate_up(call.gate_up, call.x, groups.places, width);
  check_gradients(sizes, weights, call.gradients);
  const CudaDeviceScope scope(state_->device);
  kernels::Products& products = state_->products;
  const kernels::Stream on = stream_of(stream);
  const Dtype dtype = call.x.dtype;
  const TensorView d_act = matrix(products.scratch(), Scratch::d_act, dtype, groups.places, width, on);
  const TensorView act = matrix(products.scratch(), Scratch::act, dtype, groups.places, width, on);
  const TensorView d_gate_up = matrix(products.scratch(), Scratch::d_gate_up, dtype, groups.places, 2 * width, on);
  const auto add_sums = [&](const ConstTensorView& values, const TensorView& sums) {
    kernels::add_column_sums({.groups = groups_of(groups),
                              .dtype = dtype,
                              .columns = values.shape[1],
                              .values = data_of(values),
                              .stride = stride_of(values),
                              .sums = sums.as<float>()},
                             on);
  };
  products.run(rows_args(Product::dgrad, call.dy, groups, false, weights.w2, d_act), on);
  kernels::activate_backward({.groups = groups_of(groups),
                              .activation = activation,
                              .dtype = dtype,
                              .width = static_cast<int>(width),
                              .gate_up = data_of(call.gate_up),
                              .d_act = data_of(d_act),
                              .act = data_of(act),
                              .d_gate_up = data_of(d_gate_up)},
                             products.num_sms(), on);
  products.run(wgrad_args(call.dy, act, groups, false, call.gradients.w2), on);
  if (weights.w2_bias) add_sums(call.dy, call.gradients.w2_bias);
  if (weights.w13_bias) add_sums(d_gate_up, call.gradients.w13_bias);
  products.run(wgrad_args(d_gate_up, call.x, groups, true, call.gradients.w13), on);
  products.run(rows_args(Product::dgrad, d_gate_up, groups, false, weights.w13, call.dx), on);
  check_launch("launch of experts_backward");
}

void DeviceExperts::clear_padding(const DeviceRowGroups& groups, const TensorView& rows, void* stream) {
  if (rows.ndim != 2 || rows.shape[0] != groups.places || !rows.rows_contiguous()) {
    usage_error("rows are {}; expected [{},M] with contiguous rows", describe(rows), groups.places);
  }
  const CudaDeviceScope scope(state_->device);
  const int bytes = size_of(rows.dtype);
  kernels::clear_padding({groups_of(groups), data_of(rows), stride_of(rows) * bytes, rows.shape[1] * bytes}, stream_of(stream));
  check_launch("launch of clear_padding");
}

void DeviceExperts::permute(const ConstTensorView& rows, const DeviceRowGroups& groups, const TensorView& out, void* stream) {
  if (!groups.rows) usage_error("groups have no rows; permute is for layouts that are gathered");
  const bool fits = rows.ndim == 2 && out.ndim == 2 && out.shape[0] == groups.places && out.shape[1] == rows.shape[1];
  if (!fits || out.dtype != rows.dtype || !rows.rows_contiguous() || !out.rows_contiguous()) {
    usage_error("rows are {} and out is {}; expected [N,H] and [{},H] of one dtype with contiguous rows", describe(rows), describe(out),
                groups.places);
  }
  const CudaDeviceScope scope(state_->device);
  const int bytes = size_of(rows.dtype);
  kernels::permute({.groups = groups_of(groups),
                    .rows = rows_of(groups),
                    .num_rows = rows.shape[0],
                    .from = data_of(rows),
                    .from_stride = stride_of(rows) * bytes,
                    .to = data_of(out),
                    .to_stride = stride_of(out) * bytes,
                    .row_bytes = rows.shape[1] * bytes},
                   stream_of(stream));
  check_launch("launch of permute");
}

namespace {

// What unpermute and its gradient share.
kernels::FoldArgs fold_args(const FoldInput& input, const DeviceRowGroups& groups, const ConstTensorView& out) {
  const ConstTensorView& ids = input.local_ids;
  if (!groups.rows) usage_error("groups have no rows; unpermute is for layouts that are gathered");
  const std::int64_t top_k = ids.ndim > 0 ? ids.shape[ids.ndim - 1] : 0;
  if (ids.dtype != Dtype::int32 || top_k < 1 || !ids.rows_contiguous()) {
    usage_error("local_ids is {}; expected dense int32, as dispatch gives them", ids ? describe(ids) : "absent");
  }
  const ConstTensorView& weights = input.row_weights;
  if (weights && (weights.dtype != Dtype::float32 || weights.num_elements() != ids.num_elements() || !weights.rows_contiguous())) {
    usage_error("row_weights is {}; expected {} float32, as many as local_ids", describe(weights), ids.num_elements());
  }
  const std::int64_t num_rows = ids.num_elements() / top_k;
  const std::int64_t columns = out.ndim == 2 ? out.shape[1] : 0;
  check_rows("out", out, num_rows, columns);
  return {.groups = groups_of(groups),
          .rows = rows_of(groups),
          .local_ids = ids.as<std::int32_t>(),
          .row_weights = weights ? weights.as<float>() : nullptr,
          .num_rows = num_rows,
          .top_k = static_cast<int>(top_k),
          .dtype = out.dtype,
          .columns = columns,
          .out_stride = stride_of(out)};
}

void set_places(const FoldInput& input, const ConstTensorView& out, kernels::FoldArgs& args) {
  check_rows("places", input.places, args.groups.places, args.columns);
  check_same_dtype("places", input.places, "out", out);
  args.places = data_of(input.places);
  args.places_stride = stride_of(input.places);
}

std::int32_t* place_table(kernels::Products& products, const kernels::FoldArgs& args, kernels::Stream stream) {
  const std::int64_t bytes = args.num_rows * args.top_k * static_cast<std::int64_t>(sizeof(std::int32_t));
  return reinterpret_cast<std::int32_t*>(products.scratch().take(Scratch::places, bytes, stream));
}

}  // namespace

void DeviceExperts::unpermute(const FoldInput& input, const DeviceRowGroups& groups, const TensorView& out, void* stream) {
  kernels::FoldArgs args = fold_args(input, groups, out);
  set_places(input, out, args);
  args.out = data_of(out);
  const CudaDeviceScope scope(state_->device);
  args.place_of = place_table(state_->products, args, stream_of(stream));
  kernels::find_places(args, stream_of(stream));
  kernels::unpermute(args, stream_of(stream));
  check_launch("launch of unpermute");
}

void DeviceExperts::unpermute_backward(const FoldInput& input, const DeviceRowGroups& groups, const ConstTensorView& d_out,
                                       const TensorView& d_places, const TensorView& d_row_weights, void* stream) {
  kernels::FoldArgs args = fold_args(input, groups, d_out);
  check_rows("d_places", d_places, groups.places, args.columns);
  check_same_dtype("d_out", d_out, "d_places", d_places);
  if (d_row_weights) {
    set_places(input, d_out, args);
    const bool fits = d_row_weights.dtype == Dtype::float32 && d_row_weights.num_elements() == input.local_ids.num_elements();
    if (!fits || !d_row_weights.rows_contiguous()) {
      usage_error("d_row_weights is {}; expected {} float32, as many as local_ids", describe(d_row_weights),
                  input.local_ids.num_elements());
    }
    args.d_row_weights = d_row_weights.as<float>();
  }
  args.d_out = data_of(d_out);
  args.d_places = data_of(d_places);
  args.d_places_stride = stride_of(d_places);
  const CudaDeviceScope scope(state_->device);
  args.place_of = place_table(state_->products, args, stream_of(stream));
  kernels::find_places(args, stream_of(stream));
  kernels::unpermute_backward(args, stream_of(stream));
  check_launch("launch of unpermute_backward");
}

}  // namespace tokenyard
