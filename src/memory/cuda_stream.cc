#include "memory/cuda_stream.h"

#include "core/log.h"

namespace tokenyard {

unsigned long long capture_id(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cuda_check(cudaStreamGetCaptureInfo(stream, &status, &id), "cudaStreamGetCaptureInfo of the call's stream");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

void order_streams(cudaStream_t before, cudaStream_t after, const CudaEvent& event) {
  if (before == after) return;
  cuda_check(cudaEventRecord(event.get(), before), "cudaEventRecord");
  cuda_check(cudaStreamWaitEvent(after, event.get()), "cudaStreamWaitEvent");
}

CallOrder::CallOrder() {
  eager_.event = value_or_throw(make_cuda_event());
  captured_.event = value_or_throw(make_cuda_event());
}

void CallOrder::enter(cudaStream_t stream) {
  const unsigned long long capture = capture_id(stream);
  const Tail& tail = tail_of(capture);
  if (tail.any && stream != tail.stream && capture == tail.capture)
    cuda_check(cudaStreamWaitEvent(stream, tail.event.get()), "cudaStreamWaitEvent");
}

void CallOrder::leave(cudaStream_t stream) {
  const unsigned long long capture = capture_id(stream);
  Tail& tail = tail_of(capture);
  cuda_check(cudaEventRecord(tail.event.get(), stream), "cudaEventRecord");
  tail.stream = stream;
  tail.capture = capture;
  tail.any = true;
}

void CallOrder::wait() const {
  if (eager_.any) cuda_check(cudaEventSynchronize(eager_.event.get()), "waiting for the last call");
}

MemoryOrder::MemoryOrder(int device)
    : device_(device), order_([&] {
        const CudaDeviceScope scope(device);
        return CallOrder();
      }()) {}

void MemoryOrder::enter(cudaStream_t stream) {
  order_.enter(stream);
  user_ = stream;
}

void MemoryOrder::give_back() noexcept {
  if (!user_) return;
  const CudaDeviceScope scope(device_);
  try {
    order_.leave(*user_);
  } catch (const std::exception& error) {  // while the process ends, or the stream is gone
    log_info("memory that is given back waits for nothing: {}", error.what());
  }
  user_.reset();
}

}  // namespace tokenyard
