#pragma once
// What forward and backward on GPUs share.

#include "exchange/cuda_trace.h"
#include "layer/cuda_moe.h"
#include "layer/device_calls.h"

namespace tokenyard::layer_internal {

using Phase = exchange_internal::CudaTrace::Phase;

constexpr int kCallsOfAStep = 2;  // a dispatch and a combine, forward and backward

// A call of the exchange, which tells its ranks by itself when it refuses one. TransportErrors are of earlier calls: this one was not made.
template <class Call>
auto made(int& owed, Call&& call) {
  --owed;
  try {
    return call();
  } catch (const TransportError&) {
    ++owed;
    throw;
  }
}

template <class Step>
void CudaMoe::guarded(Step&& step) {
  Exchange* const exchange = group_->exchange();
  if (exchange != nullptr) exchange->check();  // of earlier steps: this one is not begun
  int owed = exchange != nullptr ? kCallsOfAStep : 0;
  try {
    step(owed);
  } catch (const UsageError& error) {
    leave(owed, error.what());
    throw;
  } catch (const TransportError& error) {
    if (error.failure().kind == FailureKind::aborted) leave(owed, error.failure().detail);
    throw;
  }
}

}  // namespace tokenyard::layer_internal
