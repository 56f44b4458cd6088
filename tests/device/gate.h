#pragma once
// A gate in a stream: what comes later there waits until the test opens it, or for a few seconds.

#include "device/hold.h"
#include "memory/cuda_buffer.h"

namespace tokenyard::device_test {

class Gate {
 public:
  static constexpr std::uint64_t kLongestNs = 4'000'000'000;

  // Before kernels wait for peers: allocates.
  Gate() : word_(value_or_throw(make_pinned_buffer(sizeof(std::uint32_t)))) {}
  ~Gate() {
    open();
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);  // the kernel reads the word
  }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  void close_on(cudaStream_t stream) {
    stream_ = stream;
    launch_hold(word_.as<std::uint32_t>(), kLongestNs, stream);
    cuda_check(cudaGetLastError(), "closing a gate");
  }
  void open() { *word_.as<volatile std::uint32_t>() = 1; }

 private:
  PinnedBuffer word_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace tokenyard::device_test
