#include "multirank/exchange_compare.h"

#include <fmt/core.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace tokenyard::exchange_test {
namespace {

bool same_float(float a, float b) { return std::memcmp(&a, &b, sizeof(float)) == 0 || (std::isnan(a) && std::isnan(b)); }

bool same_value(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

std::vector<std::int64_t> shape_of(const ConstTensorView& view) { return {view.shape.begin(), view.shape.begin() + view.ndim}; }

}  // namespace

void Comparison::fail(const char* name, std::int64_t slot, std::int64_t column, const std::string& values) const {
  ADD_FAILURE() << fmt::format("{}, rank {}: {} differs first at slot {}, column {}: {}\n{}", where_, rank_, name, slot, column, values,
                               describe(data_.config));
}

// With capacity sizing the first dimension is a capacity, and may exceed what arrived.
void Comparison::shape(const char* name, const ConstTensorView& view, const std::vector<std::int64_t>& expected, bool may_be_longer) const {
  const std::vector<std::int64_t> seen = shape_of(view);
  const bool longer = may_be_longer && seen.size() == expected.size() && !seen.empty() && seen[0] >= expected[0] &&
                      std::equal(seen.begin() + 1, seen.end(), expected.begin() + 1);
  if (seen != expected && !longer) fail(name, -1, -1, fmt::format("expected shape {}, saw {}", expected, seen));
  if (!view.rows_contiguous() || (view.ndim == 1 && view.shape[0] > 1 && view.strides[0] != 1)) fail(name, -1, -1, "not contiguous");
}

void Comparison::integers(const char* name, const ConstTensorView& view, const std::vector<std::int32_t>& expected,
                          std::int64_t columns) const {
  if (!view || view.dtype != Dtype::int32) return fail(name, -1, -1, fmt::format("expected int32, saw {}", tokenyard::describe(view)));
  const auto count = static_cast<std::int64_t>(expected.size());
  const bool exact = data_.config.as<Sizing>(kSizing) == Sizing::exact;
  if (view.num_elements() < count || (exact && view.num_elements() != count)) {
    return fail(name, -1, -1, fmt::format("expected {} elements, saw {}", count, tokenyard::describe(view)));
  }
  Bytes copy;
  const ConstTensorView here = side_.fetch(view, copy);
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    const std::int32_t seen = here.as<std::int32_t>()[i];
    const std::int32_t wanted = i < count ? expected[i] : -1;
    if (seen != wanted) return fail(name, i / columns, i % columns, fmt::format("expected {}, saw {}", wanted, seen));
  }
}

void Comparison::metadata(const Received& received, const naive::Output& expected) const {
  const naive::DispatchSpec& spec = data_.dispatch;
  const bool expert = spec.layout == Layout::expert_major || spec.layout == Layout::expert_padded;
  const bool slots = spec.layout == Layout::rank_slots;
  const auto absent = [&](const char* name, const ConstTensorView& view) {
    if (view) fail(name, -1, -1, fmt::format("expected none in this layout, saw {}", tokenyard::describe(view)));
  };
  integers("expert_counts", received.expert_counts(), expected.expert_counts, 1);
  integers("rank_counts", received.rank_counts(), expected.rank_counts, 1);
  integers("sent_counts", received.sent_counts(), expected.sent_counts, 1);
  if (expert)
    absent("local_ids", received.local_ids());
  else
    integers("local_ids", received.local_ids(), expected.local_ids, spec.top_k);
  if (slots)
    absent("source_rank", received.source_rank());
  else
    integers("source_rank", received.source_rank(), expected.source_rank, 1);
  if (slots)
    absent("source_token", received.source_token());
  else
    integers("source_token", received.source_token(), expected.source_token, 1);
  if (expert)
    integers("source_k", received.source_k(), expected.source_k, 1);
  else
    absent("source_k", received.source_k());
  if (spec.layout == Layout::expert_major || data_.config.is(kGatherMap)) {
    integers("expert_offsets", received.expert_offsets(), expected.expert_offsets, 1);
  } else {
    absent("expert_offsets", received.expert_offsets());
  }
  if (data_.config.is(kGatherMap))
    integers("expert_rows", received.expert_rows(), expected.expert_rows, 1);
  else
    absent("expert_rows", received.expert_rows());
  if (spec.layout == Layout::expert_padded)
    integers("ranges", received.ranges(), expected.ranges, 2);
  else
    absent("ranges", received.ranges());
  if (!slots) return absent("present", received.present());
  shape("present", received.present(), {data_.placement.ranks, spec.max_tokens}, false);
  Bytes copy;
  const ConstTensorView present = side_.fetch(received.present(), copy);
  for (std::int64_t slot = 0; slot < expected.slots; ++slot) {
    const int seen = present.as<std::uint8_t>()[slot];
    if (seen != expected.present[slot]) return fail("present", slot, 0, fmt::format("expected {}, saw {}", expected.present[slot], seen));
  }
}

void Comparison::slot_rows(const char* name, const TensorView& view, const Bytes& bytes, const naive::Output& expected,
                           std::int64_t row_bytes) const {
  const std::int64_t slots = row_bytes == 0 ? 0 : view.num_elements() * size_of(view.dtype) / row_bytes;
  if (slots < expected.slots) return fail(name, -1, -1, fmt::format("expected {} rows, saw {}", expected.slots, tokenyard::describe(view)));
  const bool zeroed = data_.config.is(kZeroPadding);
  Bytes copy;
  const ConstTensorView here = side_.fetch(view, copy);
  for (std::int64_t slot = 0; slot < expected.slots; ++slot) {
    if (expected.used[slot] == 0 && !zeroed) continue;  // unspecified
    const std::uint8_t* seen = here.as<std::uint8_t>() + slot * row_bytes;
    const std::uint8_t* wanted = bytes.data() + slot * row_bytes;  // zero where not used
    for (std::int64_t b = 0; b < row_bytes; ++b) {
      if (seen[b] != wanted[b]) return fail(name, slot, b, fmt::format("expected byte {}, saw {}", wanted[b], seen[b]));
    }
  }
}

void Comparison::rows(const Received& received, const naive::Output& expected) const {
  slot_rows("rows", received.rows(), expected.rows, expected, data_.dispatch.row_bytes);
  if (data_.dispatch.scale_bytes > 0)
    slot_rows("scales", received.scales(), expected.scales, expected, data_.dispatch.scale_bytes);
  else if (received.scales())
    fail("scales", -1, -1, "expected none");
}

// On a device with capacity sizing the host never learns how many rows there are: it says -1, and the device has the number.
void Comparison::row_counts(const Received& received, const naive::Output& expected) const {
  const bool unknown = side_.on_device() && data_.config.as<Sizing>(kSizing) == Sizing::capacity;
  const auto differs = [&](std::int64_t seen, std::int64_t wanted) { return seen != wanted && !(unknown && seen == -1); };
  const std::int64_t num_rows = received.num_rows();
  if (num_rows != (unknown ? -1 : expected.num_rows))
    fail("num_rows", -1, -1, fmt::format("expected {}, saw {}", expected.num_rows, num_rows));
  if (const ConstTensorView counted = received.num_rows_device(); unknown || counted) {
    if (counted.num_elements() != 1 || counted.dtype != Dtype::int32) {
      return fail("num_rows_device", -1, -1, fmt::format("expected [1] int32, saw {}", tokenyard::describe(counted)));
    }
    Bytes copy;
    const std::int32_t seen = side_.fetch(counted, copy).as<std::int32_t>()[0];
    if (seen != expected.num_rows) fail("num_rows_device", -1, -1, fmt::format("expected {}, saw {}", expected.num_rows, seen));
  }
  const Handle& handle = received.handle();
  if (differs(handle.num_rows(), expected.token_rows)) {
    fail("handle.num_rows", -1, -1, fmt::format("expected {}, saw {}", expected.token_rows, handle.num_rows()));
  }
  const std::vector<std::int64_t> dropped(handle.dropped().begin(), handle.dropped().end());
  if (dropped != expected.dropped && !(unknown && dropped.empty())) {
    fail("dropped", -1, -1, fmt::format("expected {}, saw {}", expected.dropped, dropped));
  }
}

void Comparison::received(const Received& received, const naive::Output& expected, Dtype travelled) const {
  const naive::DispatchSpec& spec = data_.dispatch;
  const auto locals = static_cast<std::int64_t>(expected.expert_counts.size());
  const bool longer = data_.config.as<Sizing>(kSizing) == Sizing::capacity && spec.layout != Layout::rank_slots;
  std::vector<std::int64_t> slot_shape = {expected.slots};
  if (spec.layout == Layout::expert_padded) slot_shape = {locals, spec.expert_capacity > 0 ? spec.expert_capacity : spec.receive_rows};
  if (spec.layout == Layout::rank_slots) slot_shape = {data_.placement.ranks, spec.max_tokens};
  std::vector<std::int64_t> rows_shape = slot_shape;
  rows_shape.push_back(spec.row_bytes / size_of(travelled));
  const bool may_be_longer = longer && spec.layout != Layout::expert_padded;
  shape("rows", received.rows(), rows_shape, may_be_longer);
  if (received.rows().dtype != travelled) fail("rows", -1, -1, tokenyard::describe(received.rows()));
  row_counts(received, expected);
  rows(received, expected);
  metadata(received, expected);
  std::vector<std::int64_t> weights_shape = slot_shape;
  if (!expected.local_ids.empty() || spec.layout == Layout::token_major || spec.layout == Layout::rank_slots)
    weights_shape.push_back(spec.top_k);
  Bytes copy;
  const ConstTensorView weights = side_.fetch(received.row_weights(), copy);
  shape("row_weights", weights, weights_shape, may_be_longer);
  const std::int64_t columns = static_cast<std::int64_t>(weights_shape.size() - slot_shape.size()) == 1 ? spec.top_k : 1;
  for (std::int64_t i = 0; i < weights.num_elements(); ++i) {
    const float wanted = i < static_cast<std::int64_t>(expected.row_weights.size()) ? expected.row_weights[i] : 0.0F;
    const float seen = weights.as<float>()[i];
    if (!same_float(wanted, seen)) return fail("row_weights", i / columns, i % columns, fmt::format("expected {}, saw {}", wanted, seen));
  }
}

void Comparison::sums(const char* name, const TensorView& view, const Bytes& expected, std::vector<std::int64_t> wanted,
                      Dtype dtype) const {
  if (view.dtype != dtype) return fail(name, -1, -1, tokenyard::describe(view));
  if (shape_of(view) != wanted) return fail(name, -1, -1, fmt::format("expected shape {}, saw {}", wanted, shape_of(view)));
  Bytes copy;
  const ConstTensorView here = side_.fetch(view, copy);
  for (std::int64_t t = 0; t < wanted[0]; ++t) {
    const auto* row = reinterpret_cast<const std::uint8_t*>(here.row(t));
    for (std::int64_t h = 0; h < wanted[1]; ++h) {
      const double seen = naive::read(dtype, row, h);
      const double right = naive::read(dtype, expected.data(), t * wanted[1] + h);
      if (!same_value(seen, right)) return fail(name, t, h, fmt::format("expected {}, saw {}", right, seen));
    }
  }
}

void Comparison::weights(const char* name, const TensorView& view, const std::vector<float>& expected) const {
  if (view.num_elements() != static_cast<std::int64_t>(expected.size())) return fail(name, -1, -1, tokenyard::describe(view));
  Bytes copy;
  const ConstTensorView here = side_.fetch(view, copy);
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    const float seen = here.as<float>()[i];
    if (!same_float(expected[i], seen)) {
      return fail(name, i / data_.dispatch.top_k, i % data_.dispatch.top_k, fmt::format("expected {}, saw {}", expected[i], seen));
    }
  }
}

void Comparison::slot_sums(const char* name, const TensorView& view, const Bytes& expected, const naive::Output& slots, Dtype dtype) const {
  const std::int64_t hidden_size = data_.combine.hidden_size;
  if (view.dtype != dtype || view.num_elements() < slots.slots * hidden_size) return fail(name, -1, -1, tokenyard::describe(view));
  Bytes copy;
  const ConstTensorView here = side_.fetch(view, copy);
  for (std::int64_t slot = 0; slot < slots.slots; ++slot) {
    if (slots.used[slot] == 0) continue;
    for (std::int64_t h = 0; h < hidden_size; ++h) {
      const double seen = naive::read(dtype, here.as<std::uint8_t>(), slot * hidden_size + h);
      const double right = naive::read(dtype, expected.data(), slot * hidden_size + h);
      if (!same_value(seen, right)) return fail(name, slot, h, fmt::format("expected {}, saw {}", right, seen));
    }
  }
}

}  // namespace tokenyard::exchange_test
