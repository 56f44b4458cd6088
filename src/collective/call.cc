#include "collective/call.h"

#include <functional>

#include "core/usage.h"

namespace tokenyard::collective_internal {
namespace {

bool multiply(std::int64_t a, std::int64_t b, std::int64_t& product) { return !__builtin_mul_overflow(a, b, &product); }

// Elements of one row; refuses what no memory can hold, so that later arithmetic cannot overflow.
std::int64_t elements_per_row(std::string_view operation, std::string_view what, const ConstTensorView& view) {
  if (!view) usage_error("{}: no tensor was given as {}; rows need at least one dimension, e.g. [0, 4096] for none", operation, what);
  std::int64_t elements = 1;
  bool fits = view.shape[0] >= 0;
  for (int d = 1; d < view.ndim; ++d) fits = fits && view.shape[d] >= 0 && multiply(elements, view.shape[d], elements);
  std::int64_t bytes = 0;
  fits = fits && multiply(elements, size_of(view.dtype), bytes) && multiply(bytes, view.shape[0], bytes);
  if (!fits) usage_error("{}: {} is {}: its size is negative or overflows 64 bits", operation, what, describe(view));
  return elements;
}

}  // namespace

std::string_view name(Operation operation) {
  switch (operation) {
    case Operation::rejected:
      return "rejected";
    case Operation::barrier:
      return "barrier";
    case Operation::all_gather_v:
      return "all_gather_v";
    case Operation::reduce_scatter_v:
      return "reduce_scatter_v";
    case Operation::all_to_all_v:
      return "all_to_all_v";
  }
  return "unknown";
}

Call::Call(int rank, int size) : rank_(rank), size_(size), send_(size), receive_(size) {}

void Call::set_barrier() {
  operation_ = Operation::barrier;
  in_ = {};
  out_ = {};
  row_elements_ = 0;
  in_place_ = false;
  send_.assign(size_, {});
  receive_.assign(size_, {});
}

void Call::set_all_gather(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) {
  set_views(Operation::all_gather_v, in, out);
  const std::int64_t total = set_spans(receive_, "counts", counts);
  check_rows("in", in, counts[rank_]);
  check_rows("out", out, total);
  check_overlap(receive_[rank_].first, 0, true);
  send_.assign(size_, {0, counts[rank_]});
}

void Call::set_reduce_scatter(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out) {
  set_views(Operation::reduce_scatter_v, in, out);
  if (!is_summable(in.dtype)) {
    usage_error("reduce_scatter_v cannot add {}; use float64, float32, bfloat16 or float16", tokenyard::name(in.dtype));
  }
  const std::int64_t total = set_spans(send_, "counts", counts);
  check_rows("in", in, total);
  check_rows("out", out, counts[rank_]);
  check_overlap(0, send_[rank_].first, true);
  receive_.assign(size_, {0, counts[rank_]});
}

void Call::set_all_to_all(const ConstTensorView& in, std::span<const std::int64_t> send_counts, const TensorView& out,
                          std::span<const std::int64_t> receive_counts) {
  set_views(Operation::all_to_all_v, in, out);
  check_rows("in", in, set_spans(send_, "send_counts", send_counts));
  check_rows("out", out, set_spans(receive_, "receive_counts", receive_counts));
  check_overlap(0, 0, false);
  in_place_ = send_counts[rank_] == 0 || receive_counts[rank_] == 0;
}

void Call::set_views(Operation operation, const ConstTensorView& in, const TensorView& out) {
  operation_ = operation;
  const std::int64_t in_elements = elements_per_row(name(operation), "in", in);
  const std::int64_t out_elements = elements_per_row(name(operation), "out", out);
  if (in.dtype != out.dtype || in_elements != out_elements) {
    usage_error("{}: rows of in {} and of out {} differ; dtype and elements per row must be equal", name(operation), describe(in),
                describe(out));
  }
  in_ = in;
  out_ = out;
  row_elements_ = in_elements;
}

void Call::check_rows(std::string_view what, const ConstTensorView& view, std::int64_t rows) const {
  if (view.shape[0] != rows) {
    usage_error("{}: {} is {}, but the counts of rank {} say {} rows", name(operation_), what, describe(view), rank_, rows);
  }
  if (rows == 0 || row_elements_ == 0) return;
  if (view.data == nullptr) usage_error("{}: {} is {} at address 0", name(operation_), what, describe(view));
  if (!view.rows_contiguous() || (rows > 1 && view.strides[0] < row_elements_)) {
    usage_error("{}: {} is {}; elements of a row must be contiguous and rows must not overlap", name(operation_), what, describe(view));
  }
}

std::int64_t Call::set_spans(std::vector<RowSpan>& spans, std::string_view what, std::span<const std::int64_t> counts) const {
  if (std::ssize(counts) != size_) {
    usage_error("{}: {} has {} entries; give one per rank of the world: {}", name(operation_), what, counts.size(), size_);
  }
  std::int64_t total = 0;
  for (int rank = 0; rank < size_; ++rank) {
    if (counts[rank] < 0) usage_error("{}: {}[{}] is {}; counts are >= 0", name(operation_), what, rank, counts[rank]);
    spans[rank] = {total, counts[rank]};
    if (__builtin_add_overflow(total, counts[rank], &total)) {
      usage_error("{}: {} overflow 64 bits at rank {} ({} rows)", name(operation_), what, rank, counts[rank]);
    }
  }
  return total;
}

void Call::check_overlap(std::int64_t out_row, std::int64_t in_row, bool in_place_allowed) {
  in_place_ = false;
  if (in_.num_elements() == 0 || out_.num_elements() == 0) return;
  const auto end = [&](const ConstTensorView& view) { return view.row(view.shape[0] - 1) + row_bytes(); };
  const std::less<const std::byte*> before;
  const auto* in_begin = static_cast<const std::byte*>(in_.data);
  const auto* out_begin = static_cast<const std::byte*>(out_.data);
  if (!before(in_begin, end(out_)) || !before(out_begin, end(in_))) return;
  const bool same_rows =
      in_.row(in_row) == out_.row(out_row) && (in_.strides[0] == out_.strides[0] || std::min(in_.shape[0], out_.shape[0]) == 1);
  in_place_ = in_place_allowed && same_rows;
  if (in_place_) return;
  usage_error("{}: in and out overlap; {}", name(operation_),
              in_place_allowed ? "in place, this rank's rows start at the same address in both, with the same stride" : "use two buffers");
}

}  // namespace tokenyard::collective_internal
