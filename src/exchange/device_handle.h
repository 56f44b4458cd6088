#pragma once
// The handle of a dispatch on a GPU: one block of device memory, and what the host knows of it.

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "exchange/handle_facts.h"
#include "exchange/handle_shape.h"
#include "kernels/cuda/kernels.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"
#include "memory/cuda_stream.h"

namespace tokenyard::exchange_internal {

// Device memory that is used again: blocks come back when their last owner goes, and their next user waits for what their last one had
// enqueued by then. Thread-safe; outlives the exchange as long as a block does.
class BlockPool : public std::enable_shared_from_this<BlockPool> {
 public:
  explicit BlockPool(int device);
  ~BlockPool();
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  // At least `bytes` for use on `stream`, from what came back before, else allocated. What is taken while `stream` captures a graph comes
  // back for later captures alone: replays write to it for as long as the graph lives.
  std::shared_ptr<std::byte> take(std::int64_t bytes, cuda::Stream stream);
  // From now on the block is used on another stream.
  static void continue_on(const std::shared_ptr<void>& block, cuda::Stream stream);
  // Takes memory from the system now, so that later blocks come out of it: what the system gives later may wait for kernels.
  void reserve(std::int64_t bytes);

 private:
  struct Block {
    std::byte* data = nullptr;
    std::int64_t bytes = 0;
    bool captured = false;
    std::shared_ptr<MemoryOrder> order;
  };
  using Blocks = std::multimap<std::int64_t, Block>;  // by size
  struct GiveBack {
    std::shared_ptr<BlockPool> pool;
    Block block;
    void operator()(std::byte* data) const;
  };

  static std::optional<Block> take_from(Blocks& blocks, std::int64_t bytes);
  std::byte* allocate(std::int64_t bytes);

  int device_;
  std::shared_ptr<CUstream_st> stream_;
  cudaMemPool_t memory_ = nullptr;
  std::mutex mutex_;
  Blocks free_;
  Blocks free_captured_;
};

// Counts that the device tells the host, in pinned memory that is used again, what came back last at the end: a dispatch that was given up
// before its kernels ran still tells its counts.
class CountsPool : public std::enable_shared_from_this<CountsPool> {
 public:
  CountsPool() { add_slab(); }
  std::shared_ptr<cuda::HostCounts> take();

 private:
  void add_slab();

  std::mutex mutex_;
  std::vector<PinnedBuffer> slabs_;
  std::deque<cuda::HostCounts*> free_;
};

struct DeviceHandle final : HandleFacts {
  DeviceHandle(const HandleShape& shape, std::shared_ptr<std::byte> memory, std::shared_ptr<cuda::HostCounts> host_counts,
               std::int64_t tokens);

  int top_k() const override { return shape.top_k; }
  std::int64_t num_tokens() const override { return tokens; }
  std::int64_t num_token_rows() const override { return token_rows; }
  std::int64_t num_rows() const override { return layout_rows; }
  const std::vector<std::int64_t>& rows_shape() const override { return rows; }
  std::span<const std::int64_t> dropped() const override;
  ReceivedViews views() const override;
  // With Sizing::exact, when the counts are here.
  void set_counts(const cuda::HostCounts& counts);

  HandleShape shape;
  std::shared_ptr<std::byte> block;
  std::shared_ptr<cuda::HostCounts> counts;  // pinned
  cuda::HandleView view;
  std::int64_t tokens = 0;
  std::int64_t token_rows = -1;
  std::int64_t layout_rows = -1;
  std::int64_t map_rows = 0;
  std::vector<std::int64_t> rows;

 private:
  mutable std::vector<std::int64_t> dropped_;
};

}  // namespace tokenyard::exchange_internal
