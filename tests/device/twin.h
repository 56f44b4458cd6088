#pragma once
// A rank that makes its calls twice: on an exchange on its GPU, and on one on the host, whose results are the oracle, bit for bit.

#include <functional>
#include <string>

#include "device/batch.h"

namespace tokenyard::device_test {

// One dispatch and the combine of its rows, as they came.
struct RoundTrip {
  Received received;
  Combined combined;
};

class Twin {
 public:
  // Collective. `change` sees the options before the exchanges are made.
  explicit Twin(const World& world, const std::function<void(ExchangeOptions&)>& change = {}, const BatchShape& shape = {});

  Batch batch;
  Exchange device;
  Exchange host;

  // What the host's exchange makes of the batch as it is now. A collective of all ranks; `cached`: a handle of the host's.
  RoundTrip expected(const DispatchOptions& dispatch, const CombineOptions& combine = {}, const Handle* cached = nullptr);
  // Rows and scales wherever there is a row, metadata everywhere; sums. Waits for batch.stream().
  void expect_same(const RoundTrip& device, const RoundTrip& host, const std::string& where) const;
  void expect_same(const Received& device, const Received& host, const std::string& where) const;
  void expect_same(const Combined& device, const Combined& host, const std::string& where) const;
  // Rows alone; `device` may be a copy of them.
  void expect_same_rows(const ConstTensorView& device, const Received& host, const std::string& where) const;

 private:
  void expect_same(const ConstTensorView& device, const ConstTensorView& host, const std::string& where) const;
  // `on_device` and `wanted`: something per row of the output, looked at where the host has a row.
  void expect_same_rows(const ConstTensorView& on_device, const ConstTensorView& wanted, const Received& host,
                        const std::string& where) const;
};

}  // namespace tokenyard::device_test
