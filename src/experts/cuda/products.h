#pragma once
// Which kernel takes a product, and the memory it needs beside its tensors.

#include <array>
#include <optional>

#include "experts/cuda/kernels.h"
#include "memory/cuda_buffer.h"

namespace tokenyard::experts_cuda {

// Memory that grows when a call needs more of a kind than any before, and not inside a graph capture.
class Scratch {
 public:
  enum Kind : std::uint8_t { table, workspace, rows, gate_up, act, d_act, d_gate_up, places, gathered, kKinds };
  explicit Scratch(int device) : device_(device) {}
  std::byte* take(Kind kind, std::int64_t bytes, Stream stream);

 private:
  int device_;
  std::array<DeviceBuffer, kKinds> buffers_;
};

class Products {
 public:
  // The device is current.
  Products(int device, int sm_margin);
  // Gathers rows first where the kernel needs them by place.
  void run(GroupedArgs args, Stream stream);
  int num_sms() const { return num_sms_; }
  Scratch& scratch() { return scratch_; }

 private:
  void run_on_hopper(const HopperKernel& kernel, const GroupedArgs& args, Stream stream);

  int num_sms_ = 0;
  bool is_hopper_ = false;
  Scratch scratch_;
};

// None where CUTLASS is not built in, or for a type it does not serve here.
std::optional<HopperKernel> hopper_kernel(Product product, Dtype dtype);

}  // namespace tokenyard::experts_cuda
