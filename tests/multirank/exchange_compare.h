#pragma once
// Bitwise comparison of what the library returned with what the reference expects; a difference is a gtest failure that names the case,
// the rank, the tensor, the first differing place and both values.

#include <cstdint>
#include <string>
#include <vector>

#include "multirank/exchange_data.h"
#include "multirank/side.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_test {

// Compares for one rank at one point of one case.
class Comparison {
 public:
  Comparison(const CaseData& data, const Side& side, int rank, std::string where)
      : data_(data), side_(side), rank_(rank), where_(std::move(where)) {}

  // Everything that Received exposes. `travelled`: dtype of the rows.
  void received(const Received& received, const naive::Output& expected, Dtype travelled) const;
  // Rows and scales only, e.g. again after other dispatches.
  void rows(const Received& received, const naive::Output& expected) const;
  // Sums, or gradients of sums: NaN equals NaN.
  void sums(const char* name, const TensorView& view, const Bytes& expected, std::vector<std::int64_t> shape, Dtype dtype) const;
  void weights(const char* name, const TensorView& view, const std::vector<float>& expected) const;
  // Values per slot, compared where a row was received.
  void slot_sums(const char* name, const TensorView& view, const Bytes& expected, const naive::Output& slots, Dtype dtype) const;

 private:
  void fail(const char* name, std::int64_t slot, std::int64_t column, const std::string& values) const;
  void shape(const char* name, const ConstTensorView& view, const std::vector<std::int64_t>& expected, bool may_be_longer) const;
  void integers(const char* name, const ConstTensorView& view, const std::vector<std::int32_t>& expected, std::int64_t columns) const;
  void slot_rows(const char* name, const TensorView& view, const Bytes& bytes, const naive::Output& expected, std::int64_t row_bytes) const;
  void metadata(const Received& received, const naive::Output& expected) const;

  void row_counts(const Received& received, const naive::Output& expected) const;

  const CaseData& data_;
  const Side& side_;
  int rank_;
  std::string where_;
};

}  // namespace tokenyard::exchange_test
