#include "experts/cuda/products.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>

#include "core/usage.h"
#include "exchange/cuda_stream.h"
#include "memory/cuda_error.h"

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
  if (exchange_internal::is_capturing(stream)) {
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
}

void Products::run(GroupedArgs args, Stream stream) {
  if (args.groups.num_groups == 0 || args.n == 0 || args.k == 0 || args.groups.places == 0) return;
  const auto kernel = is_hopper_ && fits_hopper(args) ? hopper_kernel(args.product, args.dtype) : std::nullopt;
  if (!kernel) {
    grouped_product(args, num_sms_, stream);
    return;
  }
  if (args.x_rows != nullptr) {  // the copy engine cannot gather
    const std::int64_t row_bytes = static_cast<std::int64_t>(args.k) * size_of(args.dtype);
    std::byte* rows = scratch_.take(Scratch::rows, args.groups.places * row_bytes, stream);
    permute({.groups = args.groups,
             .rows = args.x_rows,
             .num_rows = args.num_rows,
             .from = args.x,
             .from_stride = args.x_stride * size_of(args.dtype),
             .to = rows,
             .to_stride = row_bytes,
             .row_bytes = row_bytes},
            stream);
    args.x = rows;
    args.x_stride = args.k;
    args.x_rows = nullptr;
  }
  run_on_hopper(*kernel, args, stream);
}

void Products::run_on_hopper(const HopperKernel& kernel, const GroupedArgs& args, Stream stream) {
  const int groups = args.groups.num_groups;
  std::byte* next = scratch_.take(Scratch::table, static_cast<std::int64_t>(kTableBytesPerGroup) * groups, stream);
  const auto part = [&next, groups](auto* example) {
    using Entry = std::remove_pointer_t<decltype(example)>;
    auto* begin = reinterpret_cast<Entry*>(next);
    next += sizeof(Entry) * groups;
    return begin;
  };
  HopperArgs hopper = {.grouped = args, .table = {}, .num_sms = num_sms_, .stream = stream};
  GroupTable& table = hopper.table;
  table.a = part(table.a);
  table.b = part(table.b);
  table.d = part(table.d);
  table.a_stride = part(table.a_stride);
  table.b_stride = part(table.b_stride);
  table.d_stride = part(table.d_stride);
  table.shapes = part(table.shapes);
  hopper.workspace_bytes = kernel.workspace_bytes(hopper);
  hopper.workspace = scratch_.take(Scratch::workspace, static_cast<std::int64_t>(hopper.workspace_bytes), stream);
  fill_group_table(args, table, stream);
  if (!kernel.run(hopper)) {
    cuda_check(cudaGetLastError(), "launch of a grouped product");
    TY_ASSERT(!"CUTLASS refused a product that it was chosen for");
  }
}

}  // namespace tokenyard::experts_cuda
