#include "exchange/cuda_trace.h"

#include <nvtx3/nvToolsExt.h>
#include <chrono>
#include <cmath>
#include <utility>

#include "memory/cuda_stream.h"

namespace tokenyard::exchange_internal {
namespace {

nvtxDomainHandle_t domain() {
  static nvtxDomainHandle_t handle = nvtxDomainCreateA("tokenyard");
  return handle;
}

CudaEvent timed_event() {
  cudaEvent_t event = nullptr;
  cuda_check(cudaEventCreate(&event), "cudaEventCreate");
  return CudaEvent(event);
}

std::int64_t ns_between(const CudaEvent& begin, const CudaEvent& end) {
  float ms = 0;
  cuda_check(cudaEventElapsedTime(&ms, begin.get(), end.get()), "cudaEventElapsedTime");
  return std::llround(1e6 * static_cast<double>(ms));
}

}  // namespace

CudaTrace::Phase::Phase(CudaTrace& trace, const char* name, std::uint64_t call, cudaStream_t stream) : trace_(trace), stream_(stream) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  nvtxDomainRangePushEx(domain(), &attributes);
  if (!trace.keeps_spans_ || is_capturing(stream)) return;
  at_ = trace.spans_.size();
  trace.spans_.push_back({name, call, timed_event(), timed_event()});
  cuda_check(cudaEventRecord(trace.spans_.back().begin.get(), stream), "cudaEventRecord");
}

CudaTrace::Phase::~Phase() {
  nvtxDomainRangePop(domain());
  if (at_ != kNotKept) cudaEventRecord(trace_.spans_[at_].end.get(), stream_);  // what fails here fails the call as well
}

std::vector<PhaseSpan> CudaTrace::take() {
  const std::vector<Span> spans = std::exchange(spans_, {});
  std::vector<PhaseSpan> result;
  if (spans.empty()) return result;
  for (const Span& span : spans) cuda_check(cudaEventSynchronize(span.end.get()), "waiting for a phase");
  const auto stream = value_or_throw(borrow_cuda_stream());
  const CudaEvent now = timed_event();
  cuda_check(cudaEventRecord(now.get(), stream.get()), "cudaEventRecord");
  cuda_check(cudaEventSynchronize(now.get()), "cudaEventSynchronize");
  const std::int64_t now_ns = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::int64_t first_ns = now_ns - ns_between(spans.front().begin, now);
  for (const Span& span : spans) {
    const std::int64_t begin_ns = first_ns + ns_between(spans.front().begin, span.begin);
    result.push_back({span.name, span.call, begin_ns, begin_ns + ns_between(span.begin, span.end)});
  }
  return result;
}

}  // namespace tokenyard::exchange_internal
