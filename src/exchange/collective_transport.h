#pragma once
// The exchange over collectives alone, for ranks that cannot address each other's memory, and the baseline of every
// benchmark: rows are packed per destination, deduplicated, and cross in all_to_all_v.
//
// As fast as that can be: large rows arrive where they stay, partial sums that lie in order leave from where they are, this
// rank's own rows are never packed, and buffers are kept from call to call.

#include <memory>
#include <mutex>
#include <span>

#include "core/thread_pool.h"
#include "exchange/lease_board.h"
#include "exchange/row_memory.h"
#include "exchange/row_transport.h"
#include "tokenyard/collective.h"

namespace tokenyard::exchange_internal {

class CollectiveTransport final : public RowTransport {
 public:
  // Collective. UsageError when the collectives of options.transport cannot serve this world.
  static Expected<std::unique_ptr<RowTransport>> create(const World& world, const ExchangeOptions& options,
                                                        const protocol::ArenaShape& shape, ThreadPool& pool);
  CollectiveTransport(World world, const ExchangeOptions& options, const protocol::ArenaShape& shape, ThreadPool& pool);

  Expected<void> begin_call(const protocol::CallHeader& header) override;
  void end_call(const protocol::CallHeader& header, const Failure* failure) override;
  void reject_call(std::uint64_t call, const std::string& reason) override;
  Expected<void> exchange_counts(const protocol::CallHeader& header, std::span<const std::int32_t> mine,
                                 std::vector<std::int32_t>& all) override;
  Expected<Landing> exchange_rows(const RowsCall& call) override;
  void reserve_receive_buffer() override { board_->reserve("receive buffers"); }
  void unreserve_receive_buffer() override { board_->unreserve(); }
  Expected<std::vector<float>> exchange_weights(const CombineCall& call, const ConstTensorView& source_weights) override;
  Expected<PartialTargets> begin_partials(const CombineCall& call) override;
  Expected<void> publish_partials(const CombineCall& call, const PartialTargets& targets) override;
  Expected<PartialSources> await_partials(const CombineCall& call) override;
  void release_partials(const CombineCall&) override {}
  Expected<std::byte*> expert_rows() override;
  Expected<std::uint64_t> reset(std::uint64_t last_call) override;
  void cancel() override;
  std::vector<std::int64_t> link_bytes() const override { return link_bytes_; }
  Transport transport() const override { return collectives_->transport(); }

 private:
  using Counts = std::vector<std::int64_t>;  // rows per rank

  // Where one part of the rows lies: that of row i at data + i * pitch.
  struct Plane {
    std::byte* data = nullptr;
    std::int64_t pitch = 0;
    std::byte* at(std::int64_t index) const { return data + index * pitch; }
  };
  struct Planes {
    Plane rows, scales, records;
  };
  class Scratch {
   public:
    std::byte* of(std::int64_t bytes);  // contents are lost when it grows

   private:
    RowMemory memory_;
  };
  // One side of an all_to_all_v: dense rows, ordered by rank.
  struct Side {
    const std::byte* data;
    const Counts& counts;
  };

  Expected<void> connect();
  // Runs action(), which calls collectives: their errors become values.
  template <class Action>
  static Expected<void> attempt(Phase phase, Action&& action) {
    try {
      action();
      return {};
    } catch (const TransportError& error) {
      Failure failure = error.failure();
      failure.phase = phase;
      return unexpected(std::move(failure));
    }
  }
  void all_to_all(Side in, Side out, std::int64_t row_bytes);
  static std::int64_t total(const Counts& counts);
  static Counts starts(const Counts& counts);  // where each rank's rows begin
  Counts without_own(Counts counts) const;
  Expected<void> check_headers(const protocol::CallHeader& mine, std::span<const protocol::CallHeader> headers) const;

  Expected<void> learn_counts(const RowsCall& call);
  Planes landing_planes(const RowsCall& call) const;
  void pack(const RowsCall& call, const Planes& packed, const Planes& landing);
  void exchange_in_place(const RowsCall& call, const Planes& landing);
  void exchange_packed(const RowsCall& call, const Planes& landing);
  void unpack(const RowsCall& call, const Planes& arrived, const Planes& landing);

  // Rows of a handle, and partial sums of a combine on it, per rank: this rank's tokens, and those it received.
  Counts sent_rows(const HandleState& handle) const;
  Counts received_rows(const HandleState& handle) const;
  Counts sent_partials(const CombineCall& call) const;
  Counts received_partials(const CombineCall& call) const;

  World world_;
  int rank_;
  int ranks_;
  CollectiveOptions options_;
  protocol::ArenaShape shape_;
  ThreadPool& pool_;
  std::mutex mutex_;  // guards collectives_ and cancelled_ against cancel() from another thread
  std::unique_ptr<Collectives> collectives_;
  bool cancelled_ = false;
  bool must_connect_ = false;  // a rejected call ended the collectives it was made on
  std::shared_ptr<LeaseBoard> board_;
  std::vector<RowMemory> buffers_;  // [depth]
  Counts sent_, received_;          // rows of the current dispatch
  Counts returned_;                 // partial sums of the current combine, from this rank
  bool returns_y_ = false;          // they are y's own rows
  std::vector<std::int64_t> link_bytes_;
  Scratch out_, in_, weights_out_, weights_in_;
  RowMemory expert_rows_;
};

}  // namespace tokenyard::exchange_internal
