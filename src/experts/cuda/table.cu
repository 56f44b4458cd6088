// What the Hopper kernels read of each group, made on the device from counts that only it knows.

#include <cuda_runtime.h>

#include "core/preload.h"
#include "experts/cuda/groups.cuh"
#include "experts/cuda/kernels.h"
#include "experts/cuda/scaled.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kThreads = 128;

// Where a group is in the order of descending counts. Sums of wgrad are as long as the groups; multiprocessors take tiles in turn, and
// do equally much when the tiles of one round are equally long.
__device__ __forceinline__ int rank_by_count(const Groups& groups, int group) {
  const std::int64_t count = span_of(groups, group).count;
  int rank = 0;
  for (int other = 0; other < groups.num_groups; ++other) {
    const std::int64_t its = span_of(groups, other).count;
    if (its > count || (its == count && other < group)) ++rank;
  }
  return rank;
}

__global__ void fill(const __grid_constant__ GroupedArgs args, const __grid_constant__ GroupTable table, std::int64_t bytes) {
  const int group = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= args.groups.num_groups) return;
  const Span span = span_of(args.groups, group);
  const auto count = static_cast<std::int32_t>(span.count);
  const std::int64_t matrix = static_cast<std::int64_t>(group) * args.n * args.k;
  const int g = args.product == Product::wgrad ? rank_by_count(args.groups, group) : group;
  std::int32_t* shape = table.shapes + 3 * g;
  const std::byte* rows = args.x + span.begin * args.x_stride * bytes;
  if (args.product == Product::wgrad) {
    // An empty sum adds nothing: no tile then, rather than one of no products.
    shape[0] = count == 0 ? 0 : args.n;
    shape[1] = args.k;
    shape[2] = count;
    table.a[g] = args.w + span.begin * args.w_stride * bytes;
    table.b[g] = rows;
    table.d[g] = args.y + matrix * static_cast<std::int64_t>(sizeof(float));
    table.a_stride[g] = args.w_stride;
    table.b_stride[g] = args.x_stride;
    table.d_stride[g] = args.k;
    return;
  }
  shape[0] = count;
  shape[1] = args.n;
  shape[2] = args.k;
  table.a[g] = rows;
  table.b[g] = args.w + matrix * bytes;
  table.d[g] = args.y + span.begin * args.y_stride * bytes;
  table.a_stride[g] = args.x_stride;
  table.b_stride[g] = args.product == Product::forward ? args.k : args.n;
  table.d_stride[g] = args.y_stride;
}

__global__ void fill_scaled(const __grid_constant__ ScaledArgs scaled) {
  const GroupedArgs& args = scaled.hopper.grouped;
  const GroupTable& table = scaled.hopper.table;
  const int g = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (g >= args.groups.num_groups) return;
  const Span span = span_of(args.groups, g);
  table.shapes[3 * g] = static_cast<std::int32_t>(span.count);
  table.shapes[3 * g + 1] = args.n;
  table.shapes[3 * g + 2] = args.k;
  table.a[g] = args.x + span.begin * args.x_stride;
  table.b[g] = args.w + static_cast<std::int64_t>(g) * args.n * args.k;
  table.d[g] = args.y + span.begin * args.y_stride * static_cast<std::int64_t>(sizeof(std::uint16_t));
  table.a_stride[g] = args.x_stride;
  table.b_stride[g] = args.k;
  table.d_stride[g] = args.y_stride;
  scaled.a_scales[g] = scaled.x_scales + span.begin * scale_blocks(args.k);
  scaled.b_scales[g] = scaled.w_scales + g * scale_blocks(args.n) * scale_blocks(args.k);
}

const cuda::Preloaded preloaded({{fill}, {fill_scaled}});

}  // namespace

void fill_scaled_table(const ScaledArgs& args) {
  const int blocks = (args.hopper.grouped.groups.num_groups + kThreads - 1) / kThreads;
  if (blocks > 0) fill_scaled<<<blocks, kThreads, 0, args.hopper.stream>>>(args);
}

void fill_group_table(const GroupedArgs& args, const GroupTable& table, Stream stream) {
  const int blocks = (args.groups.num_groups + kThreads - 1) / kThreads;
  if (blocks > 0) fill<<<blocks, kThreads, 0, stream>>>(args, table, size_of(args.dtype));
}

}  // namespace tokenyard::experts_cuda
