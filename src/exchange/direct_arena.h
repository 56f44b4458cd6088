#pragma once
// Symmetric memory seen through the layout of the exchange's arena.

#include <memory>

#include "memory/doorbell.h"
#include "memory/symmetric_memory.h"
#include "protocol/arena.h"
#include "protocol/mailbox.h"

namespace tokenyard::exchange_internal {

inline protocol::ArenaLayout host_arena_layout(const protocol::ArenaShape& shape) {
  return protocol::arena_layout(shape, {sizeof(Doorbell), sizeof(protocol::Beacon), sizeof(protocol::Mailbox)});
}

class DirectArena {
 public:
  DirectArena(std::shared_ptr<SymmetricMemory> memory, const protocol::ArenaShape& shape, int rank)
      : memory_(std::move(memory)), layout_(host_arena_layout(shape)), shape_(shape), rank_(rank) {}

  int rank() const { return rank_; }
  int ranks() const { return static_cast<int>(shape_.ranks); }
  const protocol::ArenaShape& shape() const { return shape_; }
  const protocol::ArenaLayout& layout() const { return layout_; }
  const SymmetricMemory& memory() const { return *memory_; }

  Doorbell& doorbell(int owner) const { return *at<Doorbell>(owner, layout_.doorbell); }
  protocol::Beacon& beacon(int owner) const { return *at<protocol::Beacon>(owner, layout_.beacon); }
  // What `writer` writes for `owner`.
  protocol::Mailbox& mailbox(int owner, int writer) const {
    return *at<protocol::Mailbox>(owner, layout_.mailboxes + writer * layout_.mailbox_bytes);
  }
  protocol::Message& message(int owner, int writer, protocol::MessageKind kind, std::uint64_t call) const {
    return mailbox(owner, writer).messages[static_cast<int>(kind)][call % protocol::kRing];
  }
  std::int32_t* counts(int owner, int writer, std::uint64_t call) const {
    return at<std::int32_t>(owner, layout_.counts + static_cast<std::int64_t>((call % 2) * shape_.ranks + writer) * layout_.counts_bytes);
  }
  std::byte* records(int owner, int buffer) const { return at<std::byte>(owner, layout_.records + buffer * layout_.records_bytes); }
  std::byte* scales(int owner, int buffer) const { return at<std::byte>(owner, layout_.scales + buffer * layout_.scales_bytes); }
  std::byte* rows(int owner, int buffer) const { return at<std::byte>(owner, layout_.rows + buffer * layout_.rows_bytes); }
  std::byte* staging(int owner) const { return at<std::byte>(owner, layout_.staging); }
  float* weights_in(int owner) const { return at<float>(owner, layout_.weights_in); }
  float* weights_back(int owner) const { return at<float>(owner, layout_.weights_back); }
  std::byte* expert_rows(int owner) const { return at<std::byte>(owner, layout_.expert_rows); }

 private:
  template <class T>
  T* at(int owner, std::int64_t offset) const {
    return reinterpret_cast<T*>(memory_->view(owner) + offset);
  }

  std::shared_ptr<SymmetricMemory> memory_;
  protocol::ArenaLayout layout_;
  protocol::ArenaShape shape_;
  int rank_;
};

}  // namespace tokenyard::exchange_internal
