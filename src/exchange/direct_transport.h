#pragma once
// The direct exchange: every row is written once, by its source, to its final place in peer-addressable memory.

#include <memory>
#include <mutex>

#include "core/thread_pool.h"
#include "exchange/direct_arena.h"
#include "exchange/lease_board.h"
#include "exchange/peer_wait.h"
#include "exchange/row_transport.h"
#include "exchange/store_choice.h"

namespace tokenyard::exchange_internal {

class DirectTransport final : public RowTransport {
 public:
  // Collective.
  static Expected<std::unique_ptr<RowTransport>> create(const World& world, const ExchangeOptions& options,
                                                        const protocol::ArenaShape& shape, ThreadPool& pool);
  DirectTransport(const World& world, const ExchangeOptions& options, std::shared_ptr<DirectArena> arena, ThreadPool& pool);

  Expected<void> begin_call(const protocol::CallHeader& header) override;
  void end_call(const protocol::CallHeader& header, const Failure* failure) override;
  void reject_call(std::uint64_t call, const std::string& reason) override;
  Expected<void> exchange_counts(const protocol::CallHeader& header, std::span<const std::int32_t> mine,
                                 std::vector<std::int32_t>& all) override;
  Expected<Landing> exchange_rows(const RowsCall& call) override;
  void reserve_receive_buffer() override { grants_->board->reserve("receive buffers"); }
  void unreserve_receive_buffer() override { grants_->board->unreserve(); }
  Expected<std::vector<float>> exchange_weights(const CombineCall& call, const ConstTensorView& source_weights) override;
  Expected<PartialTargets> begin_partials(const CombineCall& call) override;
  Expected<void> publish_partials(const CombineCall& call, const PartialTargets& targets) override;
  Expected<PartialSources> await_partials(const CombineCall& call) override;
  void release_partials(const CombineCall& call) override;
  Expected<std::byte*> expert_rows() override;
  Expected<std::uint64_t> reset(std::uint64_t last_call) override;
  void cancel() override { wait_.cancel(); }
  std::vector<std::int64_t> link_bytes() const override { return link_bytes_; }
  PeerWaits peer_waits() const override { return wait_.waits(); }
  Transport transport() const override { return arena_->memory().transport(); }

 private:
  // Tells every source which buffer it may write for the next receive epoch.
  struct Grants {
    std::shared_ptr<DirectArena> arena;
    std::shared_ptr<LeaseBoard> board;
    std::uint64_t next_epoch = 0;
    void publish(int buffer);
  };

  struct MessageExtra {
    std::int64_t count = 0;
    bool pulled = false;
  };
  void send(int peer, protocol::MessageKind kind, const protocol::CallHeader& header, MessageExtra extra);
  Expected<void> await(Phase phase, protocol::MessageKind kind, const protocol::CallHeader& header);
  Expected<void> await_grants(const protocol::CallHeader& header);
  // Where a peer's rows go.
  struct Target {
    std::byte* rows;
    std::byte* scales;
    std::byte* records;
  };
  void move_rows(const RowsCall& call, std::span<const Target> targets);
  void move_token(const RowsCall& call, std::span<const Target> targets, std::int64_t token, std::byte* scratch,
                  const StoreChoice::Stores& stores) const;
  Landing landing_of(const RowsCall& call);

  World world_;
  std::shared_ptr<DirectArena> arena_;
  ThreadPool& pool_;
  PeerWait wait_;
  std::shared_ptr<Grants> grants_;
  std::vector<std::int64_t> link_bytes_;
  StoreChoice store_choice_;
  std::uint64_t dispatch_epoch_ = 0;
  std::uint64_t unsettled_call_ = 0;  // a rejected or aborted call that some peer may not have left yet
  std::uint64_t last_combine_ = 0;    // the last call that used staging
  protocol::CallHeader last_pull_;    // the last call whose partials peers pulled from this rank
};

}  // namespace tokenyard::exchange_internal
