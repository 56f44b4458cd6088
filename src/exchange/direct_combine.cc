// The combine half of the direct exchange: weights out, partial sums back, by push into the owner's staging slots or by
// pull from the expert rank's memory.

#include <algorithm>

#include "exchange/direct_transport.h"
#include "kernels/cpu/kernels.h"
#include "protocol/flags.h"

namespace tokenyard::exchange_internal {
namespace {

using protocol::CallHeader;
using protocol::load_acquire;
using protocol::MessageKind;
using protocol::store_release;

// Index of the row of entry (rank, slot) of `token` in the receiver's order of records: in latency mode records of a
// source start at source * M.
std::int64_t record_index(const HandleState& handle, const protocol::ArenaShape& shape, int source, std::int64_t slot) {
  return handle.mode == Mode::latency ? source * shape.max_tokens_per_rank + slot : slot;
}

// Unfolded partials: one slot per (token, k, ordinal of the rank among those that serve k).
std::int64_t unfolded_slot(const protocol::ArenaShape& shape, std::int64_t token, int k, int ordinal) {
  return (token * shape.top_k + k) * shape.max_fanout + ordinal;
}

}  // namespace

Expected<std::vector<float>> DirectTransport::exchange_weights(const CombineCall& call, const ConstTensorView& source_weights) {
  const HandleState& handle = *call.handle;
  const protocol::ArenaShape& shape = arena_->shape();
  const int k = handle.top_k();
  const int rank = arena_->rank();
  // No credit: a peer has folded the last call's weights before it published the partial sums that ended that call here.
  for (std::int64_t token = 0; token < handle.sent.num_tokens; ++token) {
    for (const SendEntry& entry : handle.sent.entries_of(token)) {
      float* to = arena_->weights_in(entry.rank) + record_index(handle, shape, rank, entry.slot) * shape.top_k;
      read_weights(source_weights, token, std::span(to, k));
    }
  }
  for (int i = 0; i < arena_->ranks(); ++i) send((rank + i) % arena_->ranks(), MessageKind::weights, call.header, {});
  if (auto arrived = await(Phase::combine_weights, MessageKind::weights, call.header); !arrived) return unexpected(arrived.error());
  std::vector<float> weights(handle.received.size() * k);
  for (int source = 0; source < arena_->ranks(); ++source) {
    const std::int64_t begin = handle.received.source_begin[source];
    for (std::int64_t i = begin; i < handle.received.source_begin[source + 1]; ++i) {
      const std::int64_t index = handle.mode == Mode::latency ? source * shape.max_tokens_per_rank + (i - begin) : i;
      std::copy_n(arena_->weights_in(rank) + index * shape.top_k, k, &weights[i * k]);
    }
  }
  return weights;
}

Expected<RowTransport::PartialTargets> DirectTransport::begin_partials(const CombineCall& call) {
  const HandleState& handle = *call.handle;
  const protocol::ArenaShape& shape = arena_->shape();
  const std::uint64_t credit = last_combine_;
  auto credited = wait_.for_all(Phase::combine_credit, call.header,
                                [&](int peer) { return load_acquire(arena_->mailbox(arena_->rank(), peer).staging_free) >= credit; });
  if (!credited) return unexpected(credited.error());
  PartialTargets targets;
  const int k = handle.top_k();
  targets.pulled = call.pullable && shape.expert_rows && call.y == arena_->expert_rows(arena_->rank());
  targets.partials.assign(handle.received.size() * (call.unfolded ? k : 1), nullptr);
  targets.weights.assign(handle.received.size(), nullptr);
  for (int source = 0; source < arena_->ranks(); ++source) {
    const std::int64_t begin = handle.received.source_begin[source];
    const std::int64_t end = handle.received.source_begin[source + 1];
    const std::int64_t returned = handle.metadata.rank_counts[source];
    link_bytes_[source] += returned * call.row_bytes;
    if (source == arena_->rank()) continue;
    std::byte* const staging = arena_->staging(source);
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t slot = handle.received.partial_slot[i];
      targets.weights[i] = arena_->weights_back(source) + slot * shape.top_k;
      if (targets.pulled) continue;
      if (!call.unfolded) {
        targets.partials[i] = staging + slot * call.row_bytes;
        continue;
      }
      for (int j = 0; j < k; ++j) {
        const std::int32_t local = handle.received.local_ids[i * k + j];
        if (local < 0) continue;
        const std::int64_t at = unfolded_slot(shape, handle.received.source_token[i], j, call.shard_ordinals[local]);
        targets.partials[i * k + j] = staging + at * call.row_bytes;
      }
    }
  }
  return targets;
}

Expected<void> DirectTransport::publish_partials(const CombineCall& call, const PartialTargets& targets) {
  for (int i = 0; i < arena_->ranks(); ++i) {
    send((arena_->rank() + i) % arena_->ranks(), MessageKind::partials, call.header, {.pulled = targets.pulled});
  }
  last_combine_ = call.header.call;
  if (targets.pulled) last_pull_ = call.header;
  return {};
}

Expected<RowTransport::PartialSources> DirectTransport::await_partials(const CombineCall& call) {
  if (auto arrived = await(Phase::combine_rows, MessageKind::partials, call.header); !arrived) return unexpected(arrived.error());
  const HandleState& handle = *call.handle;
  const protocol::ArenaShape& shape = arena_->shape();
  const SendPlan& plan = handle.sent;
  const int rank = arena_->rank();
  const int k = plan.top_k;
  PartialSources sources;
  sources.partials.assign(plan.entries.size() * (call.unfolded ? k : 1), nullptr);
  sources.weights.assign(plan.entries.size(), nullptr);
  std::vector<char> pulled(arena_->ranks());
  for (int peer = 0; peer < arena_->ranks(); ++peer) {
    pulled[peer] = static_cast<char>(arena_->message(rank, peer, MessageKind::partials, call.header.call).pulled);
  }
  std::vector<int> ordinals(k);
  for (std::int64_t token = 0; token < plan.num_tokens; ++token) {
    std::fill(ordinals.begin(), ordinals.end(), 0);
    for (std::int64_t at = plan.token_begin[token]; at < plan.token_begin[token + 1]; ++at) {
      const SendEntry& entry = plan.entries[at];
      if (entry.rank != rank) {
        sources.weights[at] = arena_->weights_back(rank) + entry.partial_slot * shape.top_k;
        if (pulled[entry.rank] != 0) {
          const std::int64_t row = handle.layout == Layout::rank_slots ? rank * shape.max_tokens_per_rank + token : entry.slot;
          sources.partials[at] = arena_->expert_rows(entry.rank) + row * call.row_bytes;
        } else if (!call.unfolded) {
          sources.partials[at] = arena_->staging(rank) + entry.partial_slot * call.row_bytes;
        }
      }
      for (int j = 0; call.unfolded && j < k; ++j) {
        if ((entry.k_mask >> j & 1) == 0) continue;
        const int ordinal = ordinals[j]++;
        if (entry.rank == rank) continue;
        sources.partials[at * k + j] = arena_->staging(rank) + unfolded_slot(shape, token, j, ordinal) * call.row_bytes;
      }
    }
  }
  return sources;
}

void DirectTransport::release_partials(const CombineCall& call) {
  for (int peer = 0; peer < arena_->ranks(); ++peer) {
    protocol::Mailbox& mailbox = arena_->mailbox(peer, arena_->rank());
    store_release(mailbox.staging_free, call.header.call);  // release: after the last read of the staging slots
    store_release(mailbox.read_done, call.header.call);     // release: after the last read of the peer's expert rows
    ring(arena_->doorbell(peer));
  }
}

Expected<std::byte*> DirectTransport::expert_rows() {
  if (auto settled = begin_call({.call = unsettled_call_ + 1}); !settled) return unexpected(settled.error());
  const CallHeader last = last_pull_;  // the header that the peers' messages of that call bear: no other would match them
  auto read = wait_.for_all(Phase::combine_read, last,
                            [&](int peer) { return load_acquire(arena_->mailbox(arena_->rank(), peer).read_done) >= last.call; });
  if (!read) return unexpected(read.error());
  return arena_->expert_rows(arena_->rank());
}

}  // namespace tokenyard::exchange_internal
