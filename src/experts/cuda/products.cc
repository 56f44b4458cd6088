#include "experts/cuda/products.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>

#include "core/usage.h"
#include "kernels/cuda/kernels.h"
#include "memory/cuda_error.h"
#include "memory/cuda_stream.h"

namespace tokenyard::experts_cuda {
namespace {

constexpr int kVectorBytes = 16;  // what the copy engine wants addresses and strides to be multiples of

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cuda_check(cudaDeviceGetAttribute(&value, which, device), fmt::format("cudaDeviceGetAttribute of GPU {}", device));
  return value;
}

bool fits_hopper(const GroupedArgs& args) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(args.x) | reinterpret_cast<std::uintptr_t>(args.w) |
                         reinterpret_cast<std::uintptr_t>(args.y) | reinterpret_cast<std::uintptr_t>(args.bias);
  const std::int64_t x_stride = args.x_rows == nullptr ? args.x_stride : args.k;
  const std::int64_t elements = x_stride | args.n | args.k | args.w_stride | args.y_stride;
  return addresses % kVectorBytes == 0 && elements * size_of(args.dtype) % kVectorBytes == 0;
}

}  // namespace

std::byte* Scratch::take(Kind kind, std::int64_t bytes, Stream stream) {
  DeviceBuffer& buffer = buffers_[kind];
  if (buffer && static_cast<std::int64_t>(buffer.bytes()) >= bytes) return buffer.data();
  if (is_capturing(stream)) {
    usage_error(
        "this call needs {} bytes of scratch memory, and a graph is being captured, which cannot allocate; make a call of this "
        "shape once before the capture",
        bytes);
  }
  buffer = DeviceBuffer();
  buffer = value_or_throw(make_device_buffer(device_, static_cast<std::size_t>(bytes)));
  return buffer.data();
}

Products::Products(int device, int sm_margin) : scratch_(device) {
  constexpr int kHopperMajor = 9;
  const int sms = attribute(cudaDevAttrMultiProcessorCount, device);
  if (sm_margin < 0 || sm_margin >= sms)
    usage_error("sm_margin = {}; GPU {} has {} multiprocessors, leave it at least one", sm_margin, device, sms);
  num_sms_ = sms - sm_margin;
  is_hopper_ = attribute(cudaDevAttrComputeCapabilityMajor, device) == kHopperMajor;
  cuda::preload_kernels();
}

void Products::run(GroupedArgs args, Stream stream) {
  if (args.groups.num_groups == 0 || args.n == 0 || args.k == 0 || args.groups.places == 0) return;
  const auto kernel = is_hopper_ && fits_hopper(args) ? hopper_kernel(args) : std::nullopt;
  if (!kernel) {
    grouped_product(args, num_sms_, stream);
    return;
  }
  if (args.x_rows != nullptr) {  // the copy engine cannot gather
    const int bytes = size_of(args.dtype);
    args.x = gather_rows({args, Scratch::rows, args.x, args.x_stride * bytes, static_cast<std::int64_t>(args.k) * bytes}, stream);
    args.x_stride = args.k;
    args.x_rows = nullptr;
  }
  run_on_hopper(*kernel, args, stream);
}

const std::byte* Products::gather_rows(const RowsToGather& rows, Stream stream) {
  const GroupedArgs& args = rows.of;
  std::byte* to = scratch_.take(rows.kind, args.groups.places * rows.row_bytes, stream);
  permute({.groups = args.groups,
           .rows = args.x_rows,
           .num_rows = args.num_rows,
           .from = rows.from,
           .from_stride = rows.stride_bytes,
           .to = to,
           .to_stride = rows.row_bytes,
           .row_bytes = rows.row_bytes},
          stream);
  return to;
}

namespace {

// Parts of a piece of memory, one after the other.
class Parts {
 public:
  Parts(std::byte* memory, int count) : next_(memory), count_(count) {}
  template <class Entry>
  void put(Entry*& part) {
    part = reinterpret_cast<Entry*>(next_);
    next_ += sizeof(Entry) * static_cast<std::size_t>(count_);
  }
  void put(GroupTable& table) {
    put(table.a);
    put(table.b);
    put(table.d);
    put(table.a_stride);
    put(table.b_stride);
    put(table.d_stride);
  }

 private:
  std::byte* next_;
  int count_;
};

std::size_t workspace_bytes(const HopperKernel& kernel, const HopperArgs& args) {
  const std::size_t other = kernel.other_workspace_bytes == nullptr ? 0 : kernel.other_workspace_bytes(args);
  return std::max(kernel.workspace_bytes(args), other);
}

void check_run(bool done) {
  if (done) return;
  cuda_check(cudaGetLastError(), "launch of a grouped product");
  TY_ASSERT(!"CUTLASS refused a product that it was chosen for");
}

}  // namespace

void Products::run_on_hopper(const HopperKernel& kernel, const GroupedArgs& args, Stream stream) {
  const int groups = args.groups.num_groups;
  Parts parts(scratch_.take(Scratch::table, static_cast<std::int64_t>(kTableBytesPerGroup) * groups, stream), groups);
  HopperArgs hopper = {.grouped = args, .table = {}, .num_sms = num_sms_, .stream = stream};
  parts.put(hopper.table);
  parts.put(hopper.table.shapes);  // the smallest last: all lie aligned
  hopper.workspace_bytes = workspace_bytes(kernel, hopper);
  hopper.workspace = scratch_.take(Scratch::workspace, static_cast<std::int64_t>(hopper.workspace_bytes), stream);
  fill_group_table(args, hopper.table, stream);
  check_run(kernel.run(hopper));
}

void Products::run_scaled(ScaledArgs args, Stream stream) {
  GroupedArgs& grouped = args.hopper.grouped;
  const std::optional<ScaledKernel> kernel = is_hopper_ ? scaled_kernel(args) : std::nullopt;
  if (!kernel) {
    usage_error(
        "products of float8 rows need a Hopper GPU and a build with CUTLASS (-DTY_CUTLASS=ON, './dev deps --cutlass'); widen rows and "
        "weights to bfloat16 instead");
  }
  if (grouped.groups.num_groups == 0 || grouped.groups.places == 0) return;
  if (grouped.x_rows != nullptr) {
    const std::int64_t scale_bytes = scale_blocks(grouped.k) * static_cast<std::int64_t>(sizeof(float));
    const auto* scales = reinterpret_cast<const std::byte*>(args.x_scales);
    args.x_scales = reinterpret_cast<const float*>(gather_rows({grouped, Scratch::scales, scales, scale_bytes, scale_bytes}, stream));
    grouped.x = gather_rows({grouped, Scratch::rows, grouped.x, grouped.x_stride, grouped.k}, stream);
    grouped.x_stride = grouped.k;
    grouped.x_rows = nullptr;
  }
  const int groups = grouped.groups.num_groups;
  Parts parts(scratch_.take(Scratch::table, static_cast<std::int64_t>(kScaledTableBytesPerGroup) * groups, stream), groups);
  parts.put(args.hopper.table);
  parts.put(args.a_scales);
  parts.put(args.b_scales);
  parts.put(args.hopper.table.shapes);
  args.hopper.num_sms = num_sms_;
  args.hopper.stream = stream;
  args.hopper.workspace_bytes = kernel->workspace_bytes(args);
  args.hopper.workspace = scratch_.take(Scratch::workspace, static_cast<std::int64_t>(args.hopper.workspace_bytes), stream);
  fill_scaled_table(args);
  check_run(kernel->run(args));
}

}  // namespace tokenyard::experts_cuda
