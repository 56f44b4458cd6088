// Checks of arguments: always, before anything is sent.

#include <algorithm>
#include <cmath>

#include <fmt/ranges.h>

#include "core/usage.h"
#include "exchange/exchange_engine.h"
#include "exchange/row_transport.h"

namespace tokenyard::exchange_internal {
namespace {

void check_ids(const ExchangeEngine& engine, const DispatchInput& input) {
  const ConstTensorView& ids = input.topk_ids;
  if (ids.ndim != 1 && ids.ndim != 2) usage_error("topk_ids is {}; expected [T,K] (or [T] when K = 1)", describe(ids));
  if (ids.dtype != Dtype::int64 && ids.dtype != Dtype::int32) usage_error("topk_ids is {}; expected int64 or int32", describe(ids));
  const int top_k = top_k_of(ids);
  if (top_k < 1 || top_k > engine.options().top_k) {
    usage_error("topk_ids is {}, so top_k = {}; the exchange was made for top_k 1 to {}", describe(ids), top_k, engine.options().top_k);
  }
  if (ids.shape[0] > engine.options().max_tokens_per_rank) {
    usage_error("topk_ids has {} tokens; the exchange was made for max_tokens_per_rank = {}", ids.shape[0],
                engine.options().max_tokens_per_rank);
  }
  if (ids.shape[0] > 0 && ids.data == nullptr) usage_error("topk_ids is {} but its data is null", describe(ids));
  const ConstTensorView& weights = input.topk_weights;
  if (!weights) return;
  const bool same_shape =
      weights.shape[0] == ids.shape[0] && (weights.ndim == 2 ? weights.shape[1] == top_k : weights.ndim == 1 && top_k == 1);
  if (!same_shape || weights.dtype != Dtype::float32) {
    usage_error("topk_weights is {}; expected [{}, {}] float32 like topk_ids", describe(weights), ids.shape[0], top_k);
  }
  if (ids.shape[0] > 0 && weights.data == nullptr) usage_error("topk_weights is {} but its data is null", describe(weights));
}

void check_rows(const ExchangeEngine& engine, const DispatchInput& input, const DispatchOptions& options, std::int64_t tokens) {
  const ConstTensorView& rows = input.rows;
  if (rows.ndim != 2 || rows.shape[0] != tokens) usage_error("rows is {}; expected [{}, H], one row per token", describe(rows), tokens);
  if (tokens > 0 && rows.data == nullptr) usage_error("rows is {} but its data is null", describe(rows));
  if (!rows.rows_contiguous())
    usage_error("rows is {} with strides [{}, {}]; elements of a row must be contiguous", describe(rows), rows.strides[0], rows.strides[1]);
  const std::int64_t max_row = engine.options().max_row_bytes;
  if (options.quantise) {
    const bool is_float = rows.dtype == Dtype::bfloat16 || rows.dtype == Dtype::float16 || rows.dtype == Dtype::float32;
    if (!is_float) usage_error("rows is {}; quantise takes bfloat16, float16 or float32", describe(rows));
    if (input.scales) usage_error("scales is {} but quantise makes its own; give one of them", describe(input.scales));
  }
  const RowSource source(input, options.quantise);
  if (source.row_bytes() < 16 || source.row_bytes() % 16 != 0) {
    usage_error("rows of {} {} are {} bytes; expected a positive multiple of 16: pad the hidden size", rows.shape[1],
                name(source.row_dtype()), source.row_bytes());
  }
  if (source.row_bytes() > max_row)
    usage_error("rows are {} bytes each; the exchange was made for max_row_bytes = {}", source.row_bytes(), max_row);
  if (input.scales && (input.scales.ndim != 2 || input.scales.shape[0] != tokens)) {
    usage_error("scales is {}; expected [{}, S], one row per token", describe(input.scales), tokens);
  }
  if (input.scales && tokens > 0 && input.scales.data == nullptr) usage_error("scales is {} but its data is null", describe(input.scales));
  if (source.scale_bytes() > engine.options().max_scale_bytes) {
    usage_error("scales are {} bytes per row; the exchange was made for max_scale_bytes = {}", source.scale_bytes(),
                engine.options().max_scale_bytes);
  }
}

void check_layout(const ExchangeEngine& engine, const DispatchOptions& options) {
  const Mode mode = options.mode.value_or(engine.options().mode);
  const protocol::ArenaShape& shape = engine.shape();
  if (mode == Mode::latency && options.sizing == Sizing::exact) {
    usage_error("sizing = exact with mode = latency; latency mode never waits for counts: use sizing = capacity");
  }
  if (mode == Mode::latency && shape.receive_rows < shape.ranks * shape.max_tokens_per_rank) {
    usage_error("mode = latency needs receive_rows >= ranks x max_tokens_per_rank = {}; it is {}", shape.ranks * shape.max_tokens_per_rank,
                shape.receive_rows);
  }
  if (mode != Mode::latency && options.layout == Layout::rank_slots)
    usage_error("layout = rank_slots needs mode = latency; it is {}", name(mode));
  if (options.alignment < 1 || options.alignment > 256 || (options.alignment & (options.alignment - 1)) != 0) {
    usage_error("alignment = {}; expected a power of two, 1 to 256", options.alignment);
  }
  if (options.alignment != 1 && options.layout != Layout::expert_major)
    usage_error("alignment = {} with layout = {}; only expert_major has it", options.alignment, name(options.layout));
  if (options.gather_map && options.layout != Layout::token_major)
    usage_error("gather_map with layout = {}; only token_major has it", name(options.layout));
  if (options.expert_capacity < 0) usage_error("expert_capacity = {}; expected 0 (none) or more", options.expert_capacity);
  const bool is_expert_layout = options.layout == Layout::expert_major || options.layout == Layout::expert_padded;
  if (options.expert_capacity > 0 && !is_expert_layout)
    usage_error("expert_capacity = {} with layout = {}; only the expert layouts have it", options.expert_capacity, name(options.layout));
  if (options.drop && (options.expert_capacity == 0 || !is_expert_layout))
    usage_error("drop without expert_capacity on an expert layout drops nothing; set both");
  constexpr std::int64_t kMaxRows = std::int64_t{1} << 31;
  const std::int64_t padded = shape.max_local_experts * (options.expert_capacity == 0 ? shape.receive_rows : options.expert_capacity);
  if (options.layout == Layout::expert_padded && padded >= kMaxRows) {
    usage_error("expert_padded of {} local experts x {} rows exceeds 2^31 rows; set expert_capacity", shape.max_local_experts,
                padded / shape.max_local_experts);
  }
}

void check_output(const DispatchInput& input, const DispatchOptions& options) {
  if (!options.copy_out) {
    if (options.out_rows || options.out_scales)
      usage_error("out_rows is {} but copy_out is false; set copy_out", describe(options.out_rows));
    return;
  }
  const RowSource source(input, options.quantise);
  auto check = [](const char* what, const TensorView& out, Dtype dtype, std::int64_t columns) {
    if (!out) return;
    if (out.ndim != 2 || out.shape[1] != columns || out.dtype != dtype || out.strides[1] != 1 || out.strides[0] != columns) {
      usage_error("{} is {}; expected a dense [rows, {}] {}", what, describe(out), columns, name(dtype));
    }
  };
  check("out_rows", options.out_rows, source.row_dtype(), source.hidden_size());
  check("out_scales", options.out_scales, source.scale_dtype(), source.scale_columns());
  if (options.out_rows && source.scale_bytes() > 0 && !options.out_scales)
    usage_error("out_rows without out_scales, but the rows have scales; give both");
}

void check_waits(const ExchangeEngine& engine, const TensorView& waits) {
  if (!waits) return;
  const std::int64_t ranks = engine.world().size();
  if (waits.ndim != 1 || waits.shape[0] != ranks || waits.dtype != Dtype::int64)
    usage_error("waits is {}; expected [{}] int64, a number for each rank", describe(waits), ranks);
  if (waits.strides[0] != 1 && ranks > 1) usage_error("waits is {}; expected a dense tensor", describe(waits));
  if (waits.data == nullptr) usage_error("waits is {} but its data is null", describe(waits));
  if (engine.options().transport == Transport::mpi)
    usage_error("waits is {} with transport = mpi, which does not say for whom a rank waits; leave it out", describe(waits));
}

// What the shape of y must be for a layout; a dimension of y may name the received rows or their capacity.
void check_y(const ExchangeEngine& engine, const ConstTensorView& y, const HandleFacts& handle) {
  const std::vector<std::int64_t>& rows_shape = handle.rows_shape();
  const int dims = static_cast<int>(rows_shape.size());
  bool fits = y.ndim == dims + 1;
  for (int d = 0; fits && d < dims; ++d) fits = y.shape[d] == rows_shape[d] || (dims == 1 && y.shape[0] == handle.num_rows());
  if (!fits) {
    usage_error("y is {}; expected the rows of the dispatch: [{}, H] in layout {}", describe(y), fmt::join(rows_shape, ", "),
                name(handle.layout));
  }
  if (!is_summable(y.dtype)) usage_error("y is {}; combine adds float64, float32, bfloat16 and float16", describe(y));
  for (int d = dims - 1; fits && d >= 1; --d) fits = y.shape[d - 1] <= 1 || y.strides[d - 1] == y.strides[d] * y.shape[d];
  if (!fits || (y.strides[dims] != 1 && y.shape[dims] > 1))
    usage_error("y is {} with a gap inside; rows must be contiguous and evenly spaced", describe(y));
  const std::int64_t row_bytes = y.shape[dims] * size_of(y.dtype);
  if (row_bytes < 16 || row_bytes % 16 != 0 || row_bytes > engine.options().max_row_bytes) {
    usage_error("rows of y are {} bytes; expected a multiple of 16 up to max_row_bytes = {}", row_bytes, engine.options().max_row_bytes);
  }
  if (y.num_elements() > 0 && y.data == nullptr) usage_error("y is {} but its data is null", describe(y));
}

void check_weighting(const HandleFacts& handle, const CombineOptions& options) {
  const bool weighs = options.weighting == Weighting::at_expert || options.weighting == Weighting::at_source;
  if (weighs && !handle.is_expert_layout()) {
    usage_error("weighting = {} with layout = {}; its rows are already folded: use none, or weigh before folding", name(options.weighting),
                name(handle.layout));
  }
  if (options.weighting != Weighting::at_source) {
    if (options.source_weights) usage_error("source_weights with weighting = {}; use at_source", name(options.weighting));
    return;
  }
  const ConstTensorView& weights = options.source_weights;
  const bool fits = weights.dtype == Dtype::float32 && weights.shape[0] == handle.num_tokens() &&
                    (weights.ndim == 2 ? weights.shape[1] == handle.top_k() : weights.ndim == 1 && handle.top_k() == 1);
  if (!fits) usage_error("source_weights is {}; expected [{}, {}] float32", describe(weights), handle.num_tokens(), handle.top_k());
}

void check_row_weights(const HandleFacts& handle, const ConstTensorView& weights) {
  if (!weights) return;
  std::int64_t expected = handle.total_rows() * (handle.is_expert_layout() ? 1 : handle.top_k());
  const std::int64_t received = handle.num_rows() * (handle.is_expert_layout() ? 1 : handle.top_k());
  const bool flat = handle.rows_shape().size() == 1;
  const bool fits = weights.num_elements() == expected || (flat && weights.num_elements() == received);
  if (!fits || weights.dtype != Dtype::float32) {
    usage_error("row_weights is {}; expected {} float32 values, shaped as row_weights of layout {}", describe(weights), expected,
                name(handle.layout));
  }
  if (!weights.rows_contiguous() || weights.strides[0] * weights.shape[0] != weights.num_elements()) {
    if (weights.num_elements() > 0) usage_error("row_weights is {} with gaps; expected a dense tensor", describe(weights));
  }
}

void check_per_token(const char* what, const ConstTensorView& view, std::int64_t tokens, std::int64_t hidden_size) {
  if (!view) return;
  const bool fits = view.ndim == 2 && view.shape[0] == tokens && view.shape[1] == hidden_size && view.rows_contiguous();
  if (!fits) usage_error("{} is {}; expected [{}, {}] with contiguous rows", what, describe(view), tokens, hidden_size);
}

}  // namespace

int top_k_of(const ConstTensorView& topk_ids) {
  const std::int64_t columns = topk_ids.ndim == 2 ? topk_ids.shape[1] : 1;
  return columns > 64 ? 65 : static_cast<int>(columns);
}

void check_dispatch(const ExchangeEngine& engine, const DispatchInput& input, const DispatchOptions& options, const HandleFacts* cached) {
  if (options.allocate_out && (engine.options().device != Device::cuda || !options.copy_out || options.out_rows))
    usage_error("allocate_out with device = {}, copy_out = {} and out_rows {}; it is for cuda, with copy_out and without out_rows",
                name(engine.options().device), options.copy_out, describe(options.out_rows));
  if (cached == nullptr) {
    check_ids(engine, input);
    check_rows(engine, input, options, input.topk_ids.shape[0]);
    check_layout(engine, options);
  } else {
    if (input.topk_ids || input.topk_weights)
      usage_error("topk_ids or topk_weights with a handle; a cached dispatch follows the handle's routing and weights");
    check_rows(engine, input, options, cached->num_tokens());
  }
  check_output(input, options);
  check_waits(engine, options.waits);
}

void check_values(const ExchangeEngine& engine, const DispatchInput& input, int placement) {
  if (!engine.options().validate) return;
  const int num_experts = engine.placements()[placement].placement.num_experts();
  const int top_k = top_k_of(input.topk_ids);
  std::vector<std::int64_t> ids(top_k);
  std::vector<float> weights(top_k, 0.0F);
  for (std::int64_t token = 0; token < input.topk_ids.shape[0]; ++token) {
    read_ids(input.topk_ids, token, ids);
    if (input.topk_weights) read_weights(input.topk_weights, token, weights);
    for (int k = 0; k < top_k; ++k) {
      if (ids[k] >= num_experts) {
        usage_error("topk_ids[{}, {}] = {} but the placement has {} experts; use ids 0 to {}, or a negative one for no expert", token, k,
                    ids[k], num_experts, num_experts - 1);
      }
      if (!std::isfinite(weights[k])) usage_error("topk_weights[{}, {}] = {}; expected a finite weight", token, k, weights[k]);
    }
  }
}

void check_handle(const ExchangeEngine& engine, const Handle& handle) {
  if (!handle) usage_error("the handle is empty (never filled, or moved from); use the one that dispatch returned");
  if (handle.state()->exchange_id != engine.id())
    usage_error("the handle of call {} belongs to another exchange; a handle works on the exchange that made it", handle.state()->call);
}

std::int64_t check_expert_rows(const ExchangeEngine& engine, const Handle& handle, Dtype dtype, std::int64_t hidden_size) {
  check_handle(engine, handle);
  if (!engine.options().expert_rows) usage_error("expert_rows() needs memory for them: make the exchange with expert_rows = true");
  const HandleFacts& state = *handle.state();
  if (state.is_expert_layout())
    usage_error("expert_rows() for layout = {}; its rows are folded anyway: pass your own memory to combine", name(state.layout));
  const std::int64_t row_bytes = hidden_size * size_of(dtype);
  if (row_bytes < 16 || row_bytes % 16 != 0 || row_bytes > engine.options().max_row_bytes) {
    usage_error("expert rows of {} {} are {} bytes; expected a multiple of 16 up to max_row_bytes = {}", hidden_size, name(dtype),
                row_bytes, engine.options().max_row_bytes);
  }
  return row_bytes;
}

void check_combine(const ExchangeEngine& engine, const ConstTensorView& y, const HandleFacts& handle, const CombineOptions& options) {
  check_y(engine, y, handle);
  check_weighting(handle, options);
  check_row_weights(handle, options.row_weights);
  const std::int64_t hidden_size = y.shape[y.ndim - 1];
  check_per_token("bias0", options.bias0, handle.num_tokens(), hidden_size);
  check_per_token("bias1", options.bias1, handle.num_tokens(), hidden_size);
  check_per_token("out", options.out, handle.num_tokens(), hidden_size);
  for (const ConstTensorView& bias : {options.bias0, options.bias1}) {
    if (bias && bias.dtype != y.dtype) usage_error("a bias is {}; expected y's dtype {}", describe(bias), name(y.dtype));
  }
  if (options.out && !is_summable(options.out.dtype))
    usage_error("out is {}; expected float64, float32, bfloat16 or float16", describe(options.out));
  if (options.out && handle.num_tokens() > 0 && options.out.data == nullptr)
    usage_error("out is {} but its data is null", describe(options.out));
  check_waits(engine, options.waits);
  if (options.fold) return;
  if (!handle.is_expert_layout())
    usage_error("fold = false with layout = {}; its rows are already folded: use an expert layout", name(handle.layout));
  if (!engine.options().unfolded) usage_error("fold = false needs staging for every (token, k): make the exchange with unfolded = true");
  const std::vector<int>& groups = engine.options().reduction_groups;
  if (std::any_of(groups.begin(), groups.end(), [](int group) { return group > 0; }))
    usage_error("fold = false sums in order of k; it cannot keep reduction_groups: make the exchange without them");
}

}  // namespace tokenyard::exchange_internal
