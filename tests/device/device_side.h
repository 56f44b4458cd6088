#pragma once
// Tensors of a case on a GPU: one piece of device memory that is there before a case starts, since allocating may wait for
// kernels, which wait for peers.

#include <cstddef>

#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "multirank/side.h"

namespace tokenyard::device_test {

class DeviceSide final : public exchange_test::Side {
 public:
  static constexpr std::size_t kPoolBytes = std::size_t{1} << 30;

  // On the current GPU; the pool is another case's afterwards.
  DeviceSide(const DeviceBuffer& pool, int gpu, int ranks, Transport transport = Transport::automatic);

  bool on_device() const override { return true; }
  void adapt(ExchangeOptions& options) const override;
  void* stream() const override { return stream_.get(); }
  void* place(exchange_test::Bytes& bytes) override;
  void write(void* to, const exchange_test::Bytes& bytes) override;
  ConstTensorView fetch(const ConstTensorView& view, exchange_test::Bytes& copy) const override;

 private:
  void settle() const;

  const DeviceBuffer& pool_;
  int gpu_;
  int ranks_;
  Transport transport_;  // automatic: the case's
  std::size_t used_ = 0;
  std::shared_ptr<CUstream_st> stream_;
};

}  // namespace tokenyard::device_test
