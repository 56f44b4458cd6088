#include <algorithm>
#include <cstring>

#include "exchange/row_transport.h"
#include "kernels/cpu/kernels.h"
#include "protocol/record.h"

namespace tokenyard::exchange_internal {

RowSource::RowSource(const DispatchInput& input, const std::optional<ScaleFormat>& quantise)
    : rows_(input.rows), scales_(input.scales), quantise_(quantise) {
  row_bytes_ = rows_.shape[1] * size_of(row_dtype());
  if (quantise_) {
    scale_columns_ = tokenyard::scale_columns(rows_.shape[1], *quantise_);
  } else if (scales_) {
    scale_columns_ = scales_.shape[1];
  }
  scale_bytes_ = scale_columns_ * size_of(scale_dtype());
}

Dtype RowSource::scale_dtype() const {
  if (quantise_) return *quantise_ == ScaleFormat::ue8m0 ? Dtype::int32 : Dtype::float32;
  return scales_ ? scales_.dtype : Dtype::float32;
}

RowSource::Row RowSource::at(std::int64_t token, std::byte* scratch) const {
  if (quantise_) {
    std::byte* const scales = scratch + protocol::align_up(row_bytes_, 64);
    cpu::quantise_row({.x = rows_.row(token),
                       .dtype = rows_.dtype,
                       .elements = rows_.shape[1],
                       .format = *quantise_,
                       .q = reinterpret_cast<std::uint8_t*>(scratch),
                       .scales = scales});
    return {scratch, scales};
  }
  if (scale_columns_ == 0) return {rows_.row(token), nullptr};
  if (scales_.strides[1] == 1) return {rows_.row(token), scales_.row(token)};
  const int element = size_of(scales_.dtype);
  for (std::int64_t column = 0; column < scale_columns_; ++column) {
    std::memcpy(scratch + column * element, scales_.row(token) + column * scales_.strides[1] * element, element);
  }
  return {rows_.row(token), scratch};
}

void RowTransport::RowsCall::write_record(std::int64_t token, std::int64_t entry, std::byte* to) const {
  const int k = plan->top_k;
  const protocol::Record record{to, k};
  record.source_token() = static_cast<std::int32_t>(token);
  record.partial_slot() = plan->entries[entry].partial_slot;
  std::copy_n(&plan->local_ids[entry * k], k, record.local_ids());
  if (weights) {
    read_weights(weights, token, std::span(record.weights(), k));
  } else {
    std::fill_n(record.weights(), k, 1.0F);
  }
}

}  // namespace tokenyard::exchange_internal
