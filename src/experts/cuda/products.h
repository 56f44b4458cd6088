#pragma once
// Which kernel takes a product, and the memory it needs beside its tensors.

#include <array>
#include <optional>

#include "experts/cuda/kernels.h"
#include "experts/cuda/scaled.h"
#include "memory/cuda_buffer.h"

namespace tokenyard::experts_cuda {

// Memory that grows when a call needs more of a kind than any before, and not inside a graph capture.
class Scratch {
 public:
  enum Kind : std::uint8_t { table, workspace, rows, gate_up, act, d_act, d_gate_up, places, gathered, scales, act_scales, kKinds };
  explicit Scratch(int device) : device_(device) {}
  std::byte* take(Kind kind, std::int64_t bytes, Stream stream);

 private:
  int device_;
  std::array<DeviceBuffer, kKinds> buffers_;
};

// Rows, along the map of a product, into scratch memory.
struct RowsToGather {
  const GroupedArgs& of;
  Scratch::Kind kind = Scratch::rows;
  const std::byte* from = nullptr;
  std::int64_t stride_bytes = 0;
  std::int64_t row_bytes = 0;
};

class Products {
 public:
  // The device is current.
  Products(int device, int sm_margin);
  // Gathers rows first where the kernel needs them by place.
  void run(GroupedArgs args, Stream stream);
  // UsageError where there is no kernel for it. The rows of x and of x_scales are gathered alike.
  void run_scaled(ScaledArgs args, Stream stream);
  int num_sms() const { return num_sms_; }
  Scratch& scratch() { return scratch_; }

 private:
  const std::byte* gather_rows(const RowsToGather& rows, Stream stream);
  void run_on_hopper(const HopperKernel& kernel, const GroupedArgs& args, Stream stream);

  int num_sms_ = 0;
  bool is_hopper_ = false;
  Scratch scratch_;
};

// None where CUTLASS is not built in, or for a type it does not serve here.
std::optional<HopperKernel> hopper_kernel(const GroupedArgs& args);
std::optional<ScaledKernel> scaled_kernel(const ScaledArgs& args);

}  // namespace tokenyard::experts_cuda
