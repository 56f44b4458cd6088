#include "device/twin.h"

#include <gtest/gtest.h>

#include <cstring>

namespace tokenyard::device_test {
namespace {

using exchange_test::Bytes;

ExchangeOptions changed(ExchangeOptions options, const std::function<void(ExchangeOptions&)>& change, Device device) {
  if (change) change(options);
  if (device == Device::cuda) return options;
  options.device = Device::cpu;
  options.device_index = -1;
  options.sm_budget = 0;
  options.transport = Transport::automatic;
  return options;
}

}  // namespace

Twin::Twin(const World& world, const std::function<void(ExchangeOptions&)>& change, const BatchShape& shape)
    : batch(world, shape),
      device(world, changed(batch.options(), change, Device::cuda)),
      host(world, changed(batch.options(), change, Device::cpu)) {
  device.add(batch.placement());
  host.add(batch.placement());
}

RoundTrip Twin::expected(const DispatchOptions& dispatch, const CombineOptions& combine, const Handle* cached) {
  DispatchOptions options = dispatch;
  options.stream = nullptr;
  CombineOptions how = combine;
  how.stream = nullptr;
  RoundTrip trip;
  trip.received =
      cached != nullptr ? host.dispatch(batch.rows_only(Device::cpu), *cached, options) : host.dispatch(batch.input(Device::cpu), options);
  trip.combined = host.combine(trip.received.rows(), trip.received.handle(), how);
  return trip;
}

void Twin::expect_same(const RoundTrip& on_device, const RoundTrip& on_host, const std::string& where) const {
  expect_same(on_device.received, on_host.received, where);
  expect_same(on_device.combined, on_host.combined, where);
}

void Twin::expect_same(const Combined& on_device, const Combined& on_host, const std::string& where) const {
  expect_same(on_device.out, on_host.out, where + ": sums");
}

// Where the GPU has only room for more, what it has there is not looked at.
void Twin::expect_same(const ConstTensorView& on_device, const ConstTensorView& on_host, const std::string& where) const {
  ASSERT_EQ(static_cast<bool>(on_device), static_cast<bool>(on_host)) << where;
  ASSERT_GE(on_device.num_elements(), on_host.num_elements()) << where;
  if (on_host.num_elements() == 0) return;
  Bytes copy;
  const ConstTensorView here = batch.fetch(on_device, copy);
  const auto* const got = static_cast<const std::uint32_t*>(here.data);
  const auto* const wanted = static_cast<const std::uint32_t*>(on_host.data);
  const std::int64_t words = on_host.num_elements() * size_of(on_host.dtype) / 4;
  for (std::int64_t word = 0; word < words; ++word) {
    if (got[word] == wanted[word]) continue;
    FAIL() << where << ": word " << word << " of " << words << " is " << std::hex << got[word] << ", not " << wanted[word];
  }
}

void Twin::expect_same(const Received& on_device, const Received& on_host, const std::string& where) const {
  expect_same(on_device.expert_counts(), on_host.expert_counts(), where + ": expert_counts");
  expect_same(on_device.rank_counts(), on_host.rank_counts(), where + ": rank_counts");
  expect_same(on_device.sent_counts(), on_host.sent_counts(), where + ": sent_counts");
  expect_same(on_device.local_ids(), on_host.local_ids(), where + ": local_ids");
  expect_same(on_device.row_weights(), on_host.row_weights(), where + ": row_weights");
  expect_same(on_device.source_token(), on_host.source_token(), where + ": source_token");
  expect_same(on_device.source_k(), on_host.source_k(), where + ": source_k");
  expect_same(on_device.expert_rows(), on_host.expert_rows(), where + ": gather map");
  expect_same_rows(on_device.rows(), on_host, where);
  if (on_host.scales()) expect_same_rows(on_device.scales(), on_host.scales(), on_host, where + ": scales");
}

void Twin::expect_same_rows(const ConstTensorView& on_device, const Received& on_host, const std::string& where) const {
  expect_same_rows(on_device, on_host.rows(), on_host, where);
}

void Twin::expect_same_rows(const ConstTensorView& on_device, const ConstTensorView& wanted, const Received& on_host,
                            const std::string& where) const {
  Bytes copy;
  const ConstTensorView got = batch.fetch(on_device, copy);
  const std::int64_t columns = wanted.shape[wanted.ndim - 1];
  const std::int64_t row_bytes = columns * size_of(wanted.dtype);
  const bool in_slots = static_cast<bool>(on_host.present());
  for (std::int64_t row = 0; row < wanted.num_elements() / columns; ++row) {
    const bool is_there = in_slots ? on_host.present().as<std::uint8_t>()[row] != 0 : on_host.source_token().as<std::int32_t>()[row] >= 0;
    if (!is_there) continue;
    ASSERT_EQ(std::memcmp(got.as<std::byte>() + row * row_bytes, wanted.as<std::byte>() + row * row_bytes, row_bytes), 0)
        << where << ": row " << row;
  }
}

}  // namespace tokenyard::device_test
