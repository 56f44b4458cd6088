#include "device/device_side.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "core/expected.h"
#include "device/gpus.h"

namespace tokenyard::device_test {

using exchange_test::Bytes;

DeviceSide::DeviceSide(const DeviceBuffer& pool, int gpu, int ranks, Transport transport)
    : pool_(pool), gpu_(gpu), ranks_(ranks), transport_(transport), stream_(value_or_throw(borrow_cuda_stream())) {}

void DeviceSide::adapt(ExchangeOptions& options) const {
  options.device = Device::cuda;
  options.device_index = gpu_;
  options.sm_budget = sm_budget_of(gpu_, ranks_);
  if (transport_ != Transport::automatic) options.transport = transport_;
  options.timeout_ms = 5'000;  // a GPU is never that slow; a case that hangs must not cost the others their time
}

void* DeviceSide::place(Bytes& bytes) {
  constexpr std::size_t kAlignment = 256;
  void* at = pool_.data() + used_;
  used_ += (bytes.size() + kAlignment - 1) / kAlignment * kAlignment;
  if (used_ > pool_.bytes()) throw std::runtime_error("the tensors of a case need more than " + std::to_string(pool_.bytes()) + " bytes");
  write(at, bytes);
  return at;
}

// A copy from or to pageable memory waits for its stream inside the driver, where the other ranks of this process would wait
// for it: their kernels, which this rank's wait for, could not be launched.
void DeviceSide::settle() const { cuda_check(cudaStreamSynchronize(stream_.get()), "waiting for the rank's stream"); }

void DeviceSide::write(void* to, const Bytes& bytes) {
  if (bytes.empty()) return;
  settle();
  cuda_check(cudaMemcpyAsync(to, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_.get()), "uploading a tensor");
  cuda_check(cudaStreamSynchronize(stream_.get()), "uploading a tensor");
}

ConstTensorView DeviceSide::fetch(const ConstTensorView& view, Bytes& copy) const {
  if (view.num_elements() == 0) return view;
  std::int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  copy.resize((last + 1) * size_of(view.dtype));
  settle();
  cuda_check(cudaMemcpyAsync(copy.data(), view.data, copy.size(), cudaMemcpyDeviceToHost, stream_.get()), "downloading a tensor");
  cuda_check(cudaStreamSynchronize(stream_.get()), "downloading a tensor");
  ConstTensorView here = view;
  here.data = copy.data();
  return here;
}

}  // namespace tokenyard::device_test
