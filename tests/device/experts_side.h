#pragma once
// Rows, groups and weights of tests/experts on a GPU, and how near what comes back must be to sums in float64.

#include <gtest/gtest.h>

#include <cmath>
#include <deque>

#include "experts/rows.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "tokenyard/device_experts.h"

namespace tokenyard::device_test {

using testing::Buffer;
using testing::Case;

// Copies of host buffers in device memory, for the length of a test.
class Uploads {
 public:
  // Of the same shape and strides as the host's.
  TensorView operator()(const Buffer& host) {
    TensorView view;
    const ConstTensorView from = host.view();
    view.data = copy(host.data(), host.num_bytes());
    view.dtype = from.dtype;
    view.ndim = from.ndim;
    view.shape = from.shape;
    view.strides = from.strides;
    return view;
  }
  template <class Number>
  ConstTensorView numbers(const std::vector<Number>& host, Dtype dtype) {
    return {copy(host.data(), host.size() * sizeof(Number)), dtype, {std::ssize(host)}};
  }
  DeviceRowGroups operator()(const RowGroups& groups) {
    const auto narrow = [&](const std::vector<std::int64_t>& wide) {
      return numbers(std::vector<std::int32_t>(wide.begin(), wide.end()), Dtype::int32);
    };
    DeviceRowGroups result = {.places = groups.places, .counts = narrow(groups.counts), .begins = narrow(groups.begins)};
    if (!groups.rows.empty()) result.rows = narrow(groups.rows);
    return result;
  }

 private:
  void* copy(const void* host, std::size_t bytes) {
    memory_.push_back(value_or_throw(make_device_buffer(0, bytes)));
    cuda_check(cudaMemcpy(memory_.back().data(), host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    return memory_.back().data();
  }
  std::deque<DeviceBuffer> memory_;
};

// Waits for the device.
inline void fetch(const TensorView& from, Buffer& to) {
  cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  cuda_check(cudaMemcpy(to.data(), from.data, to.num_bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
}

// A tensor [.., columns] that a dense buffer of rows is, too.
inline TensorView shaped(TensorView view, std::initializer_list<std::int64_t> shape) { return {view.data, view.dtype, shape}; }

inline double relative_bound(Dtype dtype) { return dtype == Dtype::float32 ? 1e-5 : dtype == Dtype::float16 ? 2e-3 : 1e-2; }

// |out - expected| / |expected| over all that was asked about; a NaN is never near.
class Nearness {
 public:
  void add(double out, double expected) {
    error_ += (out - expected) * (out - expected);
    size_ += expected * expected;
    has_nan_ = has_nan_ || std::isnan(out);
  }
  void expect_within(double bound, const char* what) const {
    EXPECT_FALSE(has_nan_) << what << " has NaN";
    EXPECT_LE(std::sqrt(error_), bound * std::sqrt(size_) + 1e-30) << what;
  }

 private:
  double error_ = 0;
  double size_ = 0;
  bool has_nan_ = false;
};

// Calls fn(group, place) for every place, group -1 for padding.
template <class Fn>
void for_each_place(const RowGroups& groups, Fn&& fn) {
  std::vector<int> group_of(static_cast<std::size_t>(groups.places), -1);
  for (int g = 0; g < std::ssize(groups.counts); ++g) std::fill_n(group_of.begin() + groups.begins[g], groups.counts[g], g);
  for (std::int64_t p = 0; p < groups.places; ++p) fn(group_of[static_cast<std::size_t>(p)], p);
}

// Rows of groups are near expected(group, place, column); padding still holds NaN.
template <class Expected>
void expect_near(const Buffer& out, const RowGroups& groups, Expected&& expected, const char* what, double bound) {
  Nearness near;
  for_each_place(groups, [&](int group, std::int64_t p) {
    for (std::int64_t c = 0; c < out.columns(); ++c) {
      if (group < 0) {
        ASSERT_TRUE(std::isnan(out.at(p, c))) << what << ": padding place " << p << " was written";
      } else {
        near.add(out.at(p, c), expected(group, p, c));
      }
    }
  });
  near.expect_within(bound, what);
}
template <class Expected>
void expect_near(const Buffer& out, const RowGroups& groups, Expected&& expected, const char* what) {
  expect_near(out, groups, expected, what, relative_bound(out.dtype()));
}

}  // namespace tokenyard::device_test
