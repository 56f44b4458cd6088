#include "exchange/cuda_stream.h"

namespace tokenyard::exchange_internal {

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

CallOrder::CallOrder() : tail_(value_or_throw(make_cuda_event())) {}

void CallOrder::enter(cudaStream_t stream) {
  if (any_ && stream != last_ && capture_id(stream) == last_capture_) {
    cuda_check(cudaStreamWaitEvent(stream, tail_.get()), "cudaStreamWaitEvent");
  }
}

void CallOrder::leave(cudaStream_t stream) {
  cuda_check(cudaEventRecord(tail_.get(), stream), "cudaEventRecord");
  last_ = stream;
  last_capture_ = capture_id(stream);
  any_ = true;
}

void CallOrder::wait() const {
  if (any_ && last_capture_ == 0) cuda_check(cudaEventSynchronize(tail_.get()), "waiting for the last call");
}

}  // namespace tokenyard::exchange_internal
