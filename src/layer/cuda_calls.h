#pragma once
// What forward and backward on GPUs share.

#include "exchange/cuda_trace.h"
#include "layer/cuda_moe.h"
#include "layer/device_calls.h"

namespace tokenyard::layer_internal {

using Phase = exchange_internal::CudaTrace::Phase;

constexpr int kCallsOfAStep = 2;  // a dispatch and a combine, forward and backward

template <class Step>
void CudaMoe::guarded(void* stream, Step&& step) {
  Exchange* const exchange = group_->exchange();
  group_->check();  // of earlier steps: this one is not begun
  int owed = exchange != nullptr ? kCallsOfAStep : 0;
  try {
    step(owed);
  } catch (const UsageError& error) {
    leave(owed, error.what(), stream);
    throw;
  } catch (const TransportError& error) {
    if (error.failure().kind == FailureKind::aborted) leave(owed, error.failure().detail, stream);
    throw;
  }
}

}  // namespace tokenyard::layer_internal
