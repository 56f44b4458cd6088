#pragma once
// Order between the streams on which the calls of one exchange run, and on which its memory is used.

#include <cuda_runtime_api.h>

#include <optional>

#include "memory/cuda_handle.h"

namespace tokenyard {

// 0: `stream` captures no graph.
unsigned long long capture_id(cudaStream_t stream);
inline bool is_capturing(cudaStream_t stream) { return capture_id(stream) != 0; }

// Work on `after` waits for what is on `before` now.
void order_streams(cudaStream_t before, cudaStream_t after, const CudaEvent& event);

// The calls of an exchange run one after the other, whatever streams they are given.
class CallOrder {
 public:
  CallOrder();
  // The next call runs on `stream`, behind the last one. Inside a capture only calls of the same capture are waited for: what was
  // enqueued before it is ordered by whoever launches the graph.
  void enter(cudaStream_t stream);
  // The call is enqueued.
  void leave(cudaStream_t stream);
  // Blocks until the last call that was not captured has run.
  void wait() const;

 private:
  // The last call, of those that run at once and of those that are captured.
  struct Tail {
    CudaEvent event;
    cudaStream_t stream = nullptr;
    unsigned long long capture = 0;
    bool any = false;
  };
  Tail& tail_of(unsigned long long capture) { return capture == 0 ? eager_ : captured_; }
  Tail eager_, captured_;
};

// Memory that streams use one after the other, and that the host gives back in between: the next user waits for what the last one had
// enqueued by then. Later work of that stream is none of its business: it may be another rank's by then, and wait for this one.
class MemoryOrder {
 public:
  explicit MemoryOrder(int device);
  // `stream` uses the memory from now on, behind its last user.
  void enter(cudaStream_t stream);
  // The same user, on another stream.
  void continue_on(cudaStream_t stream) { user_ = stream; }
  // From any thread; the user's stream is still there.
  void give_back() noexcept;

 private:
  int device_;
  CallOrder order_;
  std::optional<cudaStream_t> user_;
};

}  // namespace tokenyard
