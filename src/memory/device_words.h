#pragma once
// The words that a rank's GPU shares with its host and with its peers: flags in memory that all ranks address, the state that kernels
// keep, and in pinned memory what kernels and host tell each other.

#include <cuda_runtime_api.h>

#include <memory>
#include <optional>
#include <string>

#include "memory/cuda_buffer.h"
#include "memory/cuda_stream.h"
#include "memory/symmetric_memory.h"
#include "protocol/device_words.h"
#include "tokenyard/world.h"
#include "world/lost_watch.h"

namespace tokenyard {

struct DeviceWordsOptions {
  Transport transport = Transport::cuda_peer;  // or nccl_window
  void* nccl_communicator = nullptr;           // nccl_window: as in ExchangeOptions
  int device = 0;                              // the current one
  std::int64_t arena_bytes = 0;                // the same on all ranks: the flags, and what lies behind them
  std::int64_t own_bytes = 0;                  // of this rank's own device memory, for the caller
  int timeout_ms = 0;
};

class DeviceWords {
 public:
  // Collective. All memory is zero. Throws TransportError.
  DeviceWords(const World& world, const protocol::ArenaLayout& layout, const DeviceWordsOptions& options);
  DeviceWords(const DeviceWords&) = delete;
  DeviceWords& operator=(const DeviceWords&) = delete;

  const protocol::WordsView& view() const { return view_; }
  const protocol::ArenaLayout& layout() const { return view_.layout; }
  Transport transport() const { return memory_->transport(); }
  std::byte* at(int rank, std::int64_t offset) const { return memory_->view(rank) + offset; }

  // A failure that kernels told: one that stays, or, once, that of a call that was given up.
  std::optional<protocol::ErrorRecord> take_failure() const;
  std::optional<protocol::ErrorRecord> lasting_failure() const;
  // What `record` says of any kernel. What only those of the caller mean (mismatch, overflow), it adds.
  Failure describe(const protocol::ErrorRecord& record) const;
  // Tells kernels of a rank that is lost, as long as the watch lives.
  std::unique_ptr<LostWatch> watch(const World& world) const;
  // Behind the last call of `order`: launch(reason, stream) enqueues the kernel that tells peers why this rank rejects its call.
  template <class Launch>
  void reject(CallOrder& order, cudaStream_t stream, const std::string& reason, Launch&& launch) const {
    if (is_capturing(stream)) return;  // what the graph lacks, its replays cannot tell
    order.wait();                      // the text of an earlier rejection may still be read
    set_reason(reason);
    order.enter(stream);
    launch(host().reason, stream);
    cuda_check(cudaGetLastError(), "telling peers that a call is rejected");
    order.leave(stream);
  }

 protected:
  ~DeviceWords() = default;
  protocol::HostWords& host() const { return *pinned_.as<protocol::HostWords>(); }
  std::byte* own() const { return own_; }
  cudaStream_t side() const { return side_.get(); }
  // To the host, without waiting for any other stream.
  void read(void* to, const void* from, std::size_t bytes) const;
  template <class T>
  T read(const void* from) const {
    T value;
    read(&value, from, sizeof value);
    return value;
  }

 private:
  // Why `peer` rejected this call, or a later one since: there is room for one text.
  std::string reason_of(int peer, std::uint64_t call) const;
  void set_reason(const std::string& reason) const;

  int device_;
  DeviceBuffer words_;
  PinnedBuffer pinned_;
  std::shared_ptr<CUstream_st> side_;  // of the host's looks at the device
  std::unique_ptr<SymmetricMemory> memory_;
  std::byte* own_ = nullptr;
  protocol::WordsView view_;
};

}  // namespace tokenyard
