#pragma once
// Grouped products on GPUs, whose group sizes only the device knows. Trivially copyable, passed by value.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "tokenyard/dtype.h"

struct CUstream_st;

namespace tokenyard::experts_cuda {

using Stream = CUstream_st*;  // a cudaStream_t

// As DeviceRowGroups. What lies outside [0, places) is cut off.
struct Groups {
  const std::int32_t* begins = nullptr;  // [groups]; none: group g begins at g * capacity
  const std::int32_t* counts = nullptr;  // [groups]
  std::int64_t capacity = 0;
  std::int64_t places = 0;
  int num_groups = 0;
  std::int64_t likely = 0;  // of the places; 0: all
};
// Of a group. How many there are only the device knows.
constexpr std::int64_t likely_rows(const Groups& groups) {
  return (groups.likely > 0 ? groups.likely : groups.places) / std::max(1, groups.num_groups);
}

// For each group with m places: forward y[m,n] = x[m,k] w[n,k]^T + bias[n]; dgrad y[m,n] = x[m,k] w[k,n]; wgrad y[n,k] += of the
// rows: dy[m,n]^T x[m,k], where w is dy.
enum class Product : std::uint8_t { forward, dgrad, wgrad };

struct GroupedArgs {
  Product product = Product::forward;
  Dtype dtype = Dtype::bfloat16;
  Groups groups;
  int n = 0;
  int k = 0;
  const std::byte* x = nullptr;
  std::int64_t x_stride = 0;             // elements from row to row
  const std::int32_t* x_rows = nullptr;  // [places]: the row of each place of x; none: rows lie as places
  std::int64_t num_rows = 0;             // of x, where x_rows is given
  const std::byte* w = nullptr;          // forward, dgrad: dense, a matrix for each group; wgrad: rows by place
  std::int64_t w_stride = 0;             // of rows of w
  const std::byte* bias = nullptr;       // [groups, n], forward alone
  std::byte* y = nullptr;                // forward, dgrad: rows by place of `dtype`; wgrad: dense float32, a matrix for each group
  std::int64_t y_stride = 0;
};

// What the Hopper kernels read of each group; filled on the device by fill_group_table.
struct GroupTable {
  std::int32_t* shapes = nullptr;  // [groups][3]: m, n, k as the kernel counts them
  const std::byte** a = nullptr;   // [groups]
  const std::byte** b = nullptr;
  std::byte** d = nullptr;
  std::int64_t* a_stride = nullptr;
  std::int64_t* b_stride = nullptr;
  std::int64_t* d_stride = nullptr;
};
constexpr std::size_t kTableBytesPerGroup = 3 * sizeof(std::int32_t) + 6 * sizeof(std::int64_t);

struct HopperArgs {
  GroupedArgs grouped;
  GroupTable table;
  int num_sms = 0;  // that may be used
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
  Stream stream = nullptr;
};

}  // namespace tokenyard::experts_cuda
