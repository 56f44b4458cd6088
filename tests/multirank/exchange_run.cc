#include "multirank/exchange_run.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "multirank/exchange_compare.h"

namespace tokenyard::exchange_test {
namespace {

// The caller's side of a tensor.
struct Tensor {
  Bytes bytes;
  TensorView view;
};

// [rows, columns]; `gap` unused elements behind every row.
Tensor matrix(const void* values, std::int64_t rows, std::int64_t columns, Dtype dtype, std::int64_t gap = 0) {
  Tensor tensor;
  const std::int64_t row_bytes = columns * size_of(dtype);
  const std::int64_t stride = (columns + gap) * size_of(dtype);
  tensor.bytes.assign(rows * stride + 1, 0xee);  // never empty: an empty tensor has an address too
  for (std::int64_t r = 0; r < rows && values != nullptr; ++r) {
    std::memcpy(&tensor.bytes[r * stride], static_cast<const std::uint8_t*>(values) + r * row_bytes, row_bytes);
  }
  tensor.view = TensorView(tensor.bytes.data(), dtype, {rows, columns});
  tensor.view.strides[0] = columns + gap;
  return tensor;
}

// Where the exchange is to find it.
Tensor on(Side& side, Tensor tensor) {
  tensor.view.data = side.place(tensor.bytes);
  return tensor;
}

// The same values, columns outermost.
Tensor column_major(const Bytes& values, std::int64_t rows, std::int64_t columns, Dtype dtype) {
  Tensor tensor = matrix(nullptr, columns, rows, dtype);
  const int size = size_of(dtype);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) std::memcpy(&tensor.bytes[(c * rows + r) * size], &values[(r * columns + c) * size], size);
  }
  tensor.view = TensorView(tensor.bytes.data(), dtype, {rows, columns});
  tensor.view.strides = {1, rows};
  return tensor;
}

// What a rank hands to dispatch, with the memory behind it.
class Input {
 public:
  Input(const CaseData& data, const naive::Input& given, Side& side) {
    const Case& c = data.config;
    const std::int64_t gap = c.is(kStrided) ? 3 : 0;
    const Dtype dtype = row_dtype(data);
    const std::int64_t columns = data.given_row_bytes / size_of(dtype);
    rows_ = on(side, matrix(given.rows.data(), given.tokens, columns, dtype, c.is(kStrided) ? 16 : 0));
    input.rows = rows_.view;
    if (c.as<Scales>(kScales) != Scales::none) {
      const std::int64_t scale_columns = data.dispatch.scale_bytes / 4;
      scales_ = on(side, c.as<Scales>(kScales) == Scales::dense ? matrix(given.scales.data(), given.tokens, scale_columns, Dtype::float32)
                                                                : column_major(given.scales, given.tokens, scale_columns, Dtype::float32));
      input.scales = scales_.view;
    }
    const std::vector<std::int32_t> narrow(given.ids.begin(), given.ids.end());
    const bool wide = c.as<IdsDtype>(kIdsDtype) != IdsDtype::int32;
    const void* ids = wide ? static_cast<const void*>(given.ids.data()) : narrow.data();
    ids_ = on(side, matrix(ids, given.tokens, data.dispatch.top_k, wide ? Dtype::int64 : Dtype::int32, gap));
    if (c.as<IdsDtype>(kIdsDtype) == IdsDtype::one_dimension) ids_.view.ndim = 1;
    input.topk_ids = ids_.view;
    if (!c.is(kTopkWeights)) return;
    weights_ = on(side, matrix(given.weights.data(), given.tokens, data.dispatch.top_k, Dtype::float32, gap));
    input.topk_weights = weights_.view;
  }

  // Any type of the right size does for opaque rows.
  static Dtype row_dtype(const CaseData& data) {
    const auto dtype = data.config.as<Dtype>(kDtype);
    return data.config.seed % 3 == 0 && data.config.as<Quantising>(kQuantise) == Quantising::none ? Dtype::uint8 : dtype;
  }

  DispatchInput input;

 private:
  Tensor rows_, scales_, ids_, weights_;
};

class RankRun {
 public:
  RankRun(const CaseData& data, World& world, Side& side)
      : data_(data), side_(side), rank_(world.rank()), exchange_(world, options(data, side)) {
    exchange_.add(unused_placement(data.config));
    placement_ = exchange_.add(library_placement(data.config));
  }

  void run() {
    for (std::size_t index = 0; index < data_.rounds.size(); ++index) run_round(data_.rounds[index], "round " + std::to_string(index));
    exchange_.check();
  }

 private:
  static ExchangeOptions options(const CaseData& data, const Side& side) {
    ExchangeOptions options = data.options;
    side.adapt(options);
    options.num_threads = static_cast<int>(data.config.number(kThreads));
    return options;
  }

  void run_round(const Round& round, const std::string& where) {
    const naive::Output& expected = round.received[rank_];
    const Input given(data_, round.given[rank_], side_);
    Received received = dispatch(given.input, expected, nullptr);
    compare(where + " dispatch").received(received, expected, travelled());
    const Handle handle = received.handle();
    capacity_rows_ = received.rows().ndim == 2 ? received.rows().shape[0] : 0;
    hold(received, expected);
    received = Received();
    if (data_.config.is(kCached)) {
      const naive::Output& expected_again = round.received_again[rank_];
      const Input again(data_, round.given_again[rank_], side_);
      Received cached = dispatch(again.input, expected_again, &handle);
      compare(where + " cached dispatch").received(cached, expected_again, travelled());
    }
    run_combine(round, handle, where);
    run_dispatch_backward(round, handle, where);
    run_combine_backward(round, handle, where);
    check_held(where);
  }

  DispatchOptions dispatch_options() const {
    const Case& c = data_.config;
    DispatchOptions options;
    options.placement = placement_;
    options.layout = c.as<Layout>(kLayout);
    options.sizing = c.as<Sizing>(kSizing);
    options.gather_map = c.is(kGatherMap);
    options.alignment = static_cast<int>(c.number(kAlignment));
    options.zero_padding = c.is(kZeroPadding);
    options.expert_capacity = data_.dispatch.expert_capacity;
    options.drop = data_.dispatch.drop;
    options.copy_out = c.as<CopyOut>(kCopyOut) != CopyOut::lease;
    options.token_base = c.number(kTokenBase);
    options.stream = side_.stream();
    if (c.as<Quantising>(kQuantise) != Quantising::none) options.quantise = static_cast<ScaleFormat>(c.number(kQuantise) - 1);
    return options;
  }

  Received dispatch(DispatchInput input, const naive::Output& expected, const Handle* handle) {
    DispatchOptions options = dispatch_options();
    if (data_.config.as<CopyOut>(kCopyOut) == CopyOut::caller) {
      const std::int64_t slots = data_.config.as<Sizing>(kSizing) == Sizing::exact ? expected.slots : capacity_bound(expected);
      out_rows_ = on(side_, matrix(nullptr, slots, data_.dispatch.row_bytes / size_of(travelled()), travelled()));
      options.out_rows = out_rows_.view;
      if (data_.dispatch.scale_bytes > 0) {
        out_scales_ = on(side_, matrix(nullptr, slots, data_.dispatch.scale_bytes / 4, scale_dtype()));
        options.out_scales = out_scales_.view;
      }
    }
    if (handle != nullptr) input.topk_ids = input.topk_weights = {};
    if (data_.config.is(kPhases)) {
      Pending<Received> pending =
          handle == nullptr ? exchange_.start_dispatch(input, options) : exchange_.start_dispatch(input, *handle, options);
      return pending.finish();
    }
    return handle == nullptr ? exchange_.dispatch(input, options) : exchange_.dispatch(input, *handle, options);
  }

  // At least the rows of any capacity.
  std::int64_t capacity_bound(const naive::Output& expected) const {
    const auto groups = static_cast<std::int64_t>(expected.expert_counts.size()) + 1;
    const std::int64_t bound = data_.dispatch.receive_rows * data_.dispatch.top_k + groups * data_.dispatch.alignment;
    return std::max({expected.slots, bound, data_.options.max_expert_rows});
  }

  // Rows of y: those that arrived, or the whole capacity; on a device with a capacity the host does not know how many arrived.
  std::int64_t slots(const naive::Output& received) const {
    const bool is_known = !side_.on_device() || data_.config.as<Sizing>(kSizing) == Sizing::exact;
    return is_known && data_.config.seed % 2 == 0 ? received.slots : std::max(received.slots, capacity_rows_);
  }

  // y in the memory that the case wants, shaped as the layout says; NaN where nobody may read.
  ConstTensorView layout_values(const Handle& handle, const naive::Output& received, const Bytes& values) {
    const Dtype dtype = data_.combine.dtype;
    const std::int64_t hidden_size = data_.combine.hidden_size;
    TensorView view;
    if (data_.config.is(kExpertRows)) {
      view = exchange_.expert_rows(handle, dtype, hidden_size, side_.stream());
    } else {
      values_ = on(side_, matrix(nullptr, slots(received), hidden_size, dtype, data_.config.is(kStrided) ? 16 : 0));
      view = shaped(values_.view, received);
    }
    const std::int64_t row_bytes = hidden_size * size_of(dtype);
    const std::int64_t stride = view.strides[view.ndim - 2] * size_of(dtype);
    Bytes filled(view.num_elements() / hidden_size * stride, 0xff);
    for (std::int64_t slot = 0; slot < received.slots; ++slot) std::memcpy(&filled[slot * stride], &values[slot * row_bytes], row_bytes);
    side_.write(view.data, filled);
    return view;
  }

  // rows [slots, columns] with the dimensions of the layout.
  TensorView shaped(const TensorView& rows, const naive::Output& received) const {
    const naive::DispatchSpec& spec = data_.dispatch;
    TensorView view = rows;
    std::int64_t outer = 0;
    if (spec.layout == Layout::rank_slots)
      outer = data_.placement.ranks;
    else if (spec.layout == Layout::expert_padded)
      outer = static_cast<std::int64_t>(received.expert_counts.size());
    else
      return view;
    const std::int64_t inner = spec.layout == Layout::rank_slots ? spec.max_tokens : expert_width();
    view.ndim = 3;
    view.shape = {outer, inner, rows.shape[1]};
    view.strides = {inner * rows.strides[0], rows.strides[0], 1};
    return view;
  }

  std::int64_t expert_width() const {
    return data_.dispatch.expert_capacity > 0 ? data_.dispatch.expert_capacity : data_.dispatch.receive_rows;
  }

  // Weights per row, in the shape of Received::row_weights.
  ConstTensorView layout_weights(const naive::Output& received, const std::vector<float>& weights) {
    const bool expert = data_.dispatch.layout == Layout::expert_major || data_.dispatch.layout == Layout::expert_padded;
    const std::int64_t columns = expert ? 1 : data_.dispatch.top_k;
    Tensor filled = matrix(nullptr, slots(received), columns, Dtype::float32);
    std::fill(filled.bytes.begin(), filled.bytes.end(), 0xff);
    if (!weights.empty()) std::memcpy(filled.bytes.data(), weights.data(), weights.size() * sizeof(float));
    row_weights_ = on(side_, std::move(filled));
    TensorView view = shaped(row_weights_.view, received);
    if (expert) --view.ndim;
    return view;
  }

  CombineOptions combine_options(const Round& round) {
    const Case& c = data_.config;
    const naive::CombineInput& given = round.to_combine[rank_];
    const std::int64_t tokens = round.given[rank_].tokens;
    const std::int64_t hidden_size = data_.combine.hidden_size;
    CombineOptions options;
    options.weighting = data_.combine.weighting;
    options.order = data_.combine.order;
    options.fold = data_.combine.fold;
    if (options.weighting == Weighting::at_source) {
      source_weights_ = on(side_, matrix(given.source_weights.data(), tokens, data_.dispatch.top_k, Dtype::float32));
      options.source_weights = source_weights_.view;
    }
    if (c.is(kRowWeights)) options.row_weights = layout_weights(round.received[rank_], given.row_weights);
    const auto given_rows = [&](const void* values, Dtype dtype) { return on(side_, matrix(values, tokens, hidden_size, dtype)); };
    if (c.number(kBias) >= 1) options.bias0 = (bias0_ = given_rows(given.bias0.data(), data_.combine.dtype)).view;
    if (c.number(kBias) >= 2) options.bias1 = (bias1_ = given_rows(given.bias1.data(), data_.combine.dtype)).view;
    if (c.as<Out>(kOut) != Out::own) options.out = (out_ = given_rows(nullptr, data_.combine.out_dtype)).view;
    options.stream = side_.stream();
    return options;
  }

  void run_combine(const Round& round, const Handle& handle, const std::string& where) {
    const naive::CombineOutput& expected = round.combined[rank_];
    const CombineOptions options = combine_options(round);
    const ConstTensorView y = layout_values(handle, round.received[rank_], round.to_combine[rank_].y);
    const Combined combined =
        data_.config.is(kPhases) ? exchange_.start_combine(y, handle, options).finish() : exchange_.combine(y, handle, options);
    const Comparison comparison = compare(where + " combine");
    comparison.sums("out", combined.out, expected.out, {round.given[rank_].tokens, data_.combine.hidden_size}, data_.combine.out_dtype);
    comparison.weights("combined_weights", combined.combined_weights, expected.combined_weights);
    if (options.out && combined.out.data != options.out.data) ADD_FAILURE() << "out is not where it was asked\n" << describe(data_.config);
  }

  void run_dispatch_backward(const Round& round, const Handle& handle, const std::string& where) {
    const naive::CombineInput& grads = round.row_grads[rank_];
    const naive::CombineOutput& expected = round.dispatch_grads[rank_];
    ConstTensorView grad_weights;
    if (data_.config.is(kRowWeights)) grad_weights = layout_weights(round.received[rank_], grads.row_weights);
    const ConstTensorView grad_rows = layout_values(handle, round.received[rank_], grads.y);
    const DispatchGradient gradient = exchange_.dispatch_backward(handle, grad_rows, grad_weights);
    const Comparison comparison = compare(where + " dispatch_backward");
    comparison.sums("rows", gradient.rows, expected.out, {round.given[rank_].tokens, data_.combine.hidden_size}, data_.combine.dtype);
    comparison.weights("topk_weights", gradient.topk_weights, expected.combined_weights);
  }

  void run_combine_backward(const Round& round, const Handle& handle, const std::string& where) {
    const naive::CombineGradient& expected = round.combine_grads[rank_];
    const Tensor grad =
        on(side_, matrix(round.out_grads[rank_].data(), round.given[rank_].tokens, data_.combine.hidden_size, data_.combine.dtype));
    CombineOptions options = combine_options(round);
    options.row_weights = {};
    options.out = {};
    const bool weighted = options.weighting == Weighting::at_expert || options.weighting == Weighting::at_source;
    ConstTensorView y;
    if (weighted) y = layout_values(handle, round.received[rank_], round.to_combine[rank_].y);
    const CombineGradient gradient = exchange_.combine_backward(handle, grad.view, y, options);
    const Comparison comparison = compare(where + " combine_backward");
    comparison.slot_sums("rows", gradient.rows.rows(), expected.rows, round.received[rank_], data_.combine.dtype);
    if (weighted) comparison.weights("topk_weights", gradient.topk_weights, expected.weights);
  }

  // A lease kept while other dispatches run must stay as it was; the last buffer is left for them. Memory of the caller is used again.
  void hold(const Received& received, const naive::Output& expected) {
    if (data_.config.number(kDepth) < 2 || data_.config.as<CopyOut>(kCopyOut) == CopyOut::caller) return;
    held_ = received;
    held_expected_ = &expected;
  }

  void check_held(const std::string& where) {
    if (!held_) return;
    compare(where + " held lease").rows(*held_, *held_expected_);
    held_.reset();
  }

  Dtype travelled() const {
    return data_.config.as<Quantising>(kQuantise) == Quantising::none ? Input::row_dtype(data_) : Dtype::float8_e4m3;
  }
  Dtype scale_dtype() const { return data_.config.as<Quantising>(kQuantise) == Quantising::ue8m0 ? Dtype::int32 : Dtype::float32; }
  Comparison compare(std::string where) const { return {data_, side_, rank_, std::move(where)}; }

  const CaseData& data_;
  Side& side_;
  int rank_;
  Exchange exchange_;
  int placement_ = 0;
  std::int64_t capacity_rows_ = 0;  // of the layouts with two dimensions
  Tensor out_rows_, out_scales_, values_, row_weights_, source_weights_, bias0_, bias1_, out_;
  std::optional<Received> held_;
  const naive::Output* held_expected_ = nullptr;
};

}  // namespace

void run_rank(const CaseData& data, World& world, Side& side) { RankRun(data, world, side).run(); }

void run_rank(const CaseData& data, World& world) {
  Side host;
  run_rank(data, world, host);
}

void run_threads(const Case& c) {
  const CaseData data = make_case_data(c);
  try {
    run_ranks(
        static_cast<int>(c.number(kRanks)), [&](World& world) { run_rank(data, world); }, data.options.timeout_ms);
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what() << "\n" << describe(c);
  }
}

}  // namespace tokenyard::exchange_test
