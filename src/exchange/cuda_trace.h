#pragma once
// Phases of the calls on a GPU: as NVTX ranges for profilers, and between events of their stream for Exchange::take_spans.

#include <string>
#include <vector>

#include "memory/cuda_handle.h"
#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

class CudaTrace {
 public:
  explicit CudaTrace(bool keeps_spans) : keeps_spans_(keeps_spans) {}

  // What is enqueued on `stream` during its life is the phase. Inside a capture only the NVTX range remains.
  class Phase {
   public:
    Phase(CudaTrace& trace, const char* name, std::uint64_t call, cudaStream_t stream);
    ~Phase();
    Phase(const Phase&) = delete;
    Phase& operator=(const Phase&) = delete;

   private:
    static constexpr std::size_t kNotKept = ~std::size_t{0};
    CudaTrace& trace_;
    cudaStream_t stream_ = nullptr;
    std::size_t at_ = kNotKept;  // in spans_: phases nest
  };

  // Waits for the phases that are enqueued, and forgets them.
  std::vector<PhaseSpan> take();

 private:
  struct Span {
    const char* name;
    std::uint64_t call;
    CudaEvent begin, end;
  };
  bool keeps_spans_;
  std::vector<Span> spans_;
};

}  // namespace tokenyard::exchange_internal
