#pragma once
// A CUDA graph of what some calls enqueue.

#include <functional>

#include "memory/cuda_handle.h"

namespace tokenyard {

class CudaGraph {
 public:
  // Captures `calls` on `stream`, where the graph runs later. The capture is this thread's: others go on as they like.
  CudaGraph(cudaStream_t stream, const std::function<void()>& calls) : stream_(stream) {
    cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      calls();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      cudaGetLastError();
      throw;
    }
    cuda_check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    const CudaHandle<cudaGraph_t, cudaGraphDestroy> owner(graph);
    cudaGraphExec_t exec = nullptr;
    cuda_check(cudaGraphInstantiateWithFlags(&exec, graph, 0), "cudaGraphInstantiate");
    exec_ = CudaHandle<cudaGraphExec_t, cudaGraphExecDestroy>(exec);
    cuda_check(cudaGraphUpload(exec, stream), "cudaGraphUpload");  // a launch must not allocate: that could wait for peers' kernels
    cuda_check(cudaStreamSynchronize(stream), "cudaGraphUpload");
  }
  void launch() const { cuda_check(cudaGraphLaunch(exec_.get(), stream_), "cudaGraphLaunch"); }

 private:
  cudaStream_t stream_;
  CudaHandle<cudaGraphExec_t, cudaGraphExecDestroy> exec_;
};

}  // namespace tokenyard
