#pragma once
// One collective call as every transport sees it: checked, with the rows that go to and come from each rank.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "collective/row_bytes.h"
#include "tokenyard/tensor_view.h"

namespace tokenyard::collective_internal {

enum class Operation : std::uint8_t { rejected, barrier, all_gather_v, reduce_scatter_v, all_to_all_v };
std::string_view name(Operation operation);

// Rows [first, first + count) of a view.
struct RowSpan {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

// Reused from call to call, so that the steady state allocates nothing. The set_* functions throw UsageError for views
// and counts that do not fit; what holds between ranks is agreement.h's matter.
class Call {
 public:
  Call(int rank, int size);

  void set_barrier();
  void set_all_gather(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out);
  void set_reduce_scatter(const ConstTensorView& in, std::span<const std::int64_t> counts, const TensorView& out);
  void set_all_to_all(const ConstTensorView& in, std::span<const std::int64_t> send_counts, const TensorView& out,
                      std::span<const std::int64_t> receive_counts);

  Operation operation() const { return operation_; }
  Dtype dtype() const { return out_.dtype; }
  std::int64_t row_elements() const { return row_elements_; }
  std::int64_t row_bytes() const { return row_elements_ * size_of(out_.dtype); }
  const ConstTensorView& in() const { return in_; }
  const TensorView& out() const { return out_; }
  bool in_place() const { return in_place_; }
  // Rows of in() that go to `rank`, and rows of out() that come from it. In a reduce_scatter_v every rank's rows land on the same ones.
  const RowSpan& send(int rank) const { return send_[rank]; }
  const RowSpan& receive(int rank) const { return receive_[rank]; }
  RowBytes<const std::byte> send_bytes(int rank) const { return {in_, row_bytes(), send_[rank].first, send_[rank].count}; }
  RowBytes<std::byte> receive_bytes(int rank) const { return {out_, row_bytes(), receive_[rank].first, receive_[rank].count}; }

 private:
  void set_views(Operation operation, const ConstTensorView& in, const TensorView& out);
  void check_rows(std::string_view what, const ConstTensorView& view, std::int64_t rows) const;
  std::int64_t set_spans(std::vector<RowSpan>& spans, std::string_view what, std::span<const std::int64_t> counts) const;
  // `in_place`: in and out may be one and the same range; any other overlap is refused.
  void check_overlap(std::int64_t out_row, std::int64_t in_row, bool in_place_allowed);

  int rank_;
  int size_;
  Operation operation_ = Operation::barrier;
  std::int64_t row_elements_ = 0;
  bool in_place_ = false;
  ConstTensorView in_;
  TensorView out_;
  std::vector<RowSpan> send_;
  std::vector<RowSpan> receive_;
};

}  // namespace tokenyard::collective_internal
