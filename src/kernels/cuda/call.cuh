#pragma once
// A call as kernels see it: its number, its flags, waits with a deadline, and how it ends.

#include "kernels/cuda/context.h"
#include "kernels/cuda/ptx.cuh"
#include "tokenyard/error.h"

namespace tokenyard::cuda {

using protocol::Flag;
using protocol::of_call;

__device__ inline std::byte* arena(const Context& c, int rank) {
  return rank < protocol::kNearRanks ? c.near_arenas[rank] : c.arenas[rank];
}
// What `writer` writes for `owner`.
__device__ inline protocol::DeviceMailbox& mailbox(const Context& c, int owner, int writer) {
  return *reinterpret_cast<protocol::DeviceMailbox*>(arena(c, owner) + c.layout.mailboxes + writer * c.layout.mailbox_bytes);
}
__device__ inline const std::uint64_t* flag_of(const Context& c, Flag flag, int peer) {
  return &mailbox(c, c.rank, peer).flags[static_cast<int>(flag)];
}
__device__ inline std::byte* receive_rows(const Context& c, int owner, int buffer) {
  return arena(c, owner) + c.layout.rows + buffer * c.layout.rows_bytes;
}
__device__ inline std::byte* receive_scales(const Context& c, int owner, int buffer) {
  return arena(c, owner) + c.layout.scales + buffer * c.layout.scales_bytes;
}
__device__ inline std::byte* receive_records(const Context& c, int owner, int buffer) {
  return arena(c, owner) + c.layout.records + buffer * c.layout.records_bytes;
}
__device__ inline std::byte* staging(const Context& c, int owner) { return arena(c, owner) + c.layout.staging; }
__device__ inline std::byte* expert_rows(const Context& c, int owner) { return arena(c, owner) + c.layout.expert_rows; }
__device__ inline float* weights_in(const Context& c, int owner) { return reinterpret_cast<float*>(arena(c, owner) + c.layout.weights_in); }
__device__ inline float* weights_back(const Context& c, int owner) {
  return reinterpret_cast<float*>(arena(c, owner) + c.layout.weights_back);
}
// count_word()s.
__device__ inline std::uint64_t* count_row(const Context& c, int owner, int writer, std::uint64_t call) {
  return reinterpret_cast<std::uint64_t*>(arena(c, owner) + c.layout.counts +
                                          static_cast<std::int64_t>((call % 2) * c.shape.ranks + writer) * c.layout.counts_bytes);
}
// A flag word: `source`, which sets it, has stored its token for `owner`.
__device__ inline std::uint64_t* arrival(const Context& c, int owner, int source, std::int64_t token) {
  return reinterpret_cast<std::uint64_t*>(arena(c, owner) + c.layout.arrivals) + source * c.shape.max_tokens_per_rank + token;
}
__device__ inline protocol::DeviceBeacon& beacon(const Context& c, int owner) {
  return *reinterpret_cast<protocol::DeviceBeacon*>(arena(c, owner) + c.layout.beacon);
}

// The number of the call under way. The kernels of a call are ordered by the stream, so plain reads do. It costs a trip to the
// L2 cache: kernels in a hurry ask once.
__device__ inline std::uint64_t call_number(const Context& c) { return *const_cast<volatile std::uint64_t*>(&c.state->call) + 1; }
__device__ inline bool has_failed(const Context& c) {
  const volatile protocol::DeviceState& state = *c.state;
  const std::uint64_t failed = state.failed, dead_call = state.dead_call, call = state.call;  // loaded at once
  return failed != 0 || dead_call == call + 1;
}

// What a kernel asks first, in one trip to the L2 cache.
struct CallState {
  std::uint64_t call = 0;  // under way
  std::uint64_t last_pull = 0;
  std::uint64_t unsettled = 0;
  bool failed = false;
};
// One thread looks, for all blocks look at the same words. Block-uniform; a barrier lies between two looks of a block.
__device__ inline CallState state_of_call(const Context& c) {
  __shared__ CallState seen;
  if (threadIdx.x == 0) {
    const volatile protocol::DeviceState& state = *c.state;
    const std::uint64_t call = state.call + 1, last_pull = state.last_pull, unsettled = state.unsettled;
    const std::uint64_t dead_call = state.dead_call, failed = state.failed;
    seen = {.call = call, .last_pull = last_pull, .unsettled = unsettled, .failed = failed != 0 || dead_call == call};
  }
  __syncthreads();
  return seen;
}

// A kernel begins with instructions that are in no cache, so there are to be few: failures and waits are not inlined, loops over ranks
// not unrolled (docs/kernels.md).

// The first failure of a call is the one that is told.
__device__ __noinline__ inline void record_failure(const Context& c, protocol::ErrorRecord record) {
  const bool sticky = record.kind != static_cast<std::uint32_t>(FailureKind::aborted);
  record.call = call_number(c);
  if (atomicExch(reinterpret_cast<unsigned long long*>(&c.state->dead_call), record.call) == record.call) return;
  if (sticky)
    c.state->failed = protocol::pack_failure(record.kind, record.phase, record.peer);
  else
    c.state->unsettled = record.call;
  protocol::ErrorRecord& to = sticky ? *c.failure : *c.abort;
  record.set = 0;
  to = record;
  __threadfence_system();
  *const_cast<volatile std::uint32_t*>(&to.set) = 1;
}

__device__ __noinline__ inline void fail(const Context& c, FailureKind kind, Phase phase, int peer, std::int64_t expected,
                                         std::int64_t seen) {
  protocol::ErrorRecord record;
  record.kind = static_cast<std::uint32_t>(kind);
  record.phase = static_cast<std::uint32_t>(phase);
  record.peer = peer;
  record.expected = expected;
  record.seen = seen;
  record_failure(c, record);
}
// A wait for this call that ended otherwise.
__device__ inline void fail(const Context& c, FailureKind kind, Phase phase, int peer, std::int64_t seen) {
  fail(c, kind, phase, peer, static_cast<std::int64_t>(call_number(c)), seen);
}

// Why `peer` may never set a flag: it rejected the call, ended, is late, or this rank has failed already.
struct Trouble {
  bool any = false;
  bool is_told = false;  // by another thread
  FailureKind kind = FailureKind::aborted;
  Phase phase = Phase::none;
  int peer = -1;
};
__device__ inline Trouble trouble_with(const Context& c, int peer, Phase phase, std::uint64_t call) {
  if (has_failed(c)) return {.any = true, .is_told = true};
  if (ptx::load_acquire(&mailbox(c, c.rank, peer).aborted) >= call) {
    return {.any = true, .kind = FailureKind::aborted, .phase = phase, .peer = peer};
  }
  const std::uint64_t theirs = ptx::load_acquire(&mailbox(c, c.rank, peer).failed);
  if (theirs != 0) {  // it blames somebody, or nobody but itself
    const int blamed = protocol::failure_peer(theirs);
    return {.any = true,
            .kind = static_cast<FailureKind>(protocol::failure_kind(theirs)),
            .phase = static_cast<Phase>(protocol::failure_phase(theirs)),
            .peer = blamed < 0 ? peer : blamed};
  }
  const std::uint32_t lost = ptx::load_relaxed(&c.stop->lost_peer);
  if (lost != 0) return {.any = true, .kind = FailureKind::peer_lost, .phase = phase, .peer = static_cast<int>(lost) - 1};
  return {};
}

struct Wait {
  int peer = 0;  // whoever sets the word
  Phase phase = Phase::none;
  std::uint64_t call = 0;
  unsigned pause_ns = 0;  // between looks
  bool timed = false;     // of all that wait for this peer in this phase, this one tells for how long
};
// By a wait that has lasted for a while: tells the host of it, and looks for what may end it.
__device__ __noinline__ inline Trouble look_for_trouble(const Context& c, const Wait& wait, std::uint64_t begin) {
  protocol::DeviceBeacon& mine = beacon(c, c.rank);
  mine.call = wait.call;
  mine.phase = static_cast<std::uint32_t>(wait.phase);
  mine.waiting_on = static_cast<std::uint32_t>(wait.peer) + 1;
  const Trouble trouble = trouble_with(c, wait.peer, wait.phase, wait.call);
  if (trouble.any || ptx::global_timer_ns() - begin <= c.timeout_ns) return trouble;
  return {.any = true, .kind = FailureKind::timeout, .phase = wait.phase, .peer = wait.peer};
}

// The part of await() behind its first look.
template <class IsThere>
__device__ __noinline__ inline std::uint64_t await_longer(const Context& c, const std::uint64_t* word, const Wait& wait, IsThere is_there) {
  std::uint64_t seen;
  const auto is_set = [&] { return is_there(seen = ptx::load_acquire(word)); };
  const std::uint64_t begin = ptx::global_timer_ns();
  constexpr int kLookEvery = 256;  // waits are short: look for trouble now and then
  while (true) {
    for (int i = 0; i < kLookEvery; ++i) {
      if (is_set()) {
        // Here and not behind the loop: there a thread may meet those of its warp that wait longer.
        if (wait.timed && c.waits != nullptr && wait.peer != c.rank) atomicAdd(&c.waits[wait.peer], ptx::global_timer_ns() - begin);
        beacon(c, c.rank).waiting_on = 0;
        return seen;
      }
      if (wait.pause_ns != 0) __nanosleep(wait.pause_ns);
    }
    const std::uint64_t last = protocol::flag_call(seen);
    if (const Trouble trouble = look_for_trouble(c, wait, begin); trouble.any) {
      if (is_set()) return has_failed(c) ? 0 : seen;  // it did so before it came into trouble
      if (!trouble.is_told) fail(c, trouble.kind, trouble.phase, trouble.peer, static_cast<std::int64_t>(last));
      return 0;
    }
  }
}

// Waits in this thread until is_there(word), and returns the word. 0: the call has failed.
template <class IsThere>
__device__ inline std::uint64_t await(const Context& c, const std::uint64_t* word, const Wait& wait, IsThere is_there) {
  const std::uint64_t seen = ptx::load_acquire(word);
  return is_there(seen) ? seen : await_longer(c, word, wait, is_there);
}
// Until the word is `least` or more.
__device__ inline std::uint64_t await_word(const Context& c, const std::uint64_t* word, std::uint64_t least, const Wait& wait) {
  return await(c, word, wait, [least](std::uint64_t seen) { return seen >= least; });
}
__device__ inline bool wait_for_word(const Context& c, const std::uint64_t* word, std::uint64_t least, const Wait& wait) {
  return await_word(c, word, least, wait) != 0;
}
__device__ inline bool wait_for_flag(const Context& c, Flag flag, const Wait& wait) {
  return wait_for_word(c, flag_of(c, flag, wait.peer), protocol::flag_word(wait.call), wait);
}

// Waits in this thread until this rank itself has begun: another block sees to it, and to deadlines.
__device__ inline bool wait_for_own_begin(const Context& c, std::uint64_t call) {
  const std::uint64_t* word = flag_of(c, of_call(Flag::begun, call), c.rank);
  while (protocol::flag_call(ptx::load_acquire(word)) < call) {
    if (has_failed(c)) return false;
  }
  return true;
}

// The whole block waits for `flag` of every rank, itself included. Block-uniform; false: the call has failed. Ends with a
// barrier, behind which all threads see what the flags publish. timed: of the blocks that wait for it, this one tells for how long.
__device__ inline bool wait_for_all(const Context& c, Flag flag, Phase phase, std::uint64_t call, bool timed) {
  bool arrived = true;
#pragma unroll 1
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    arrived = wait_for_flag(c, flag, {.peer = peer, .phase = phase, .call = call, .timed = timed}) && arrived;
  }
  return __syncthreads_and(arrived) != 0;
}

// Tells `peer`, by one thread. release at system scope: publishes what this thread has done and seen before, and so what
// other threads have done before a barrier or a ticket that lies behind it.
__device__ inline void set_flag(const Context& c, Flag flag, int peer, std::uint64_t call, std::uint32_t bits = 0) {
  ptx::store_release(&mailbox(c, peer, c.rank).flags[static_cast<int>(flag)], protocol::flag_word(call, bits));
}
// Publishes nothing but itself.
__device__ inline void set_flag_relaxed(const Context& c, Flag flag, int peer, std::uint64_t call, std::uint32_t bits = 0) {
  ptx::store_relaxed(&mailbox(c, peer, c.rank).flags[static_cast<int>(flag)], protocol::flag_word(call, bits));
}
// By the threads of one block, after a barrier behind the work to publish.
__device__ inline void set_flag_everywhere(const Context& c, Flag flag, std::uint64_t call) {
#pragma unroll 1
  for (int i = threadIdx.x; i < c.ranks; i += blockDim.x) set_flag(c, flag, (c.rank + 1 + i) % c.ranks, call);
}
__device__ inline void set_flag_everywhere(const Context& c, Flag flag) { set_flag_everywhere(c, flag, call_number(c)); }

// What call this rank makes, for the peer to check. Nothing here waits: a reader knows by the digest when it has all of the header.
__device__ inline void tell_call(const Context& c, const protocol::CallHeader& header, int peer) {
  set_flag_relaxed(c, of_call(Flag::digest, header.call), peer, header.call, protocol::digest(header));
  mailbox(c, peer, c.rank).headers[header.call % protocol::kRing] = header;
}
// Tells the other ranks that this one has begun, what it offers and what call it makes. By the threads of one block. Relaxed: what
// earlier kernels did is done, and of this one nothing is published.
__device__ inline void announce(const Context& c, protocol::CallHeader header, std::uint32_t offer, std::uint64_t call) {
  header.call = call;
#pragma unroll 1
  for (int i = threadIdx.x; i < c.ranks - 1; i += blockDim.x) {
    const int peer = (c.rank + 1 + i) % c.ranks;
    set_flag_relaxed(c, of_call(Flag::begun, call), peer, call, offer);
    tell_call(c, header, peer);
  }
}
// The header with this digest that `peer` has sent or is sending. What is there after a second is told in any case.
__device__ __noinline__ inline protocol::CallHeader header_of(const Context& c, int peer, std::uint64_t call, std::uint32_t digest) {
  constexpr std::uint64_t kPatienceNs = 1'000'000'000;
  const volatile auto& box = reinterpret_cast<const volatile std::uint64_t(&)[sizeof(protocol::CallHeader) / 8]>(
      mailbox(c, c.rank, peer).headers[call % protocol::kRing]);
  protocol::CallHeader header;
  const std::uint64_t begin = ptx::global_timer_ns();
  do {
    for (std::size_t i = 0; i < sizeof header / 8; ++i) reinterpret_cast<std::uint64_t*>(&header)[i] = box[i];
  } while (protocol::digest(header) != digest && ptx::global_timer_ns() - begin < kPatienceNs);
  return header;
}

// After Flag::begun of `peer` was seen: does it make the same call?
__device__ inline bool agrees(const Context& c, protocol::CallHeader header, int peer, Phase phase, std::uint64_t call) {
  header.call = call;
  const std::uint64_t theirs = await_word(c, flag_of(c, of_call(Flag::digest, call), peer), protocol::flag_word(call), {peer, phase, call});
  if (theirs == 0) return false;
  if (theirs == protocol::flag_word(call, protocol::digest(header))) return true;
  protocol::ErrorRecord record;
  record.kind = static_cast<std::uint32_t>(FailureKind::mismatch);
  record.phase = static_cast<std::uint32_t>(phase);
  record.peer = peer;
  record.expected = static_cast<std::int64_t>(call);
  record.mine = header;
  record.theirs = header_of(c, peer, call, static_cast<std::uint32_t>(theirs & ((1U << protocol::kFlagBits) - 1)));
  record.seen = static_cast<std::int64_t>(record.theirs.call);
  record_failure(c, record);
  return false;
}

// Do all ranks make the same call? By the threads of a block from the last one on: the first ones may have other peers to wait for.
__device__ inline bool check_peers(const Context& c, const protocol::CallHeader& header, Phase phase, std::uint64_t call) {
  bool good = true;
#pragma unroll 1
  for (int peer = static_cast<int>(blockDim.x - 1 - threadIdx.x); peer < c.ranks; peer += static_cast<int>(blockDim.x)) {
    if (peer != c.rank) good = agrees(c, header, peer, phase, call) && good;
  }
  return good;
}

// Until every rank has left the rejected call, one that came late may still write what it was about. By the whole block that announces
// the next one, before it does. Block-uniform.
__device__ inline bool leave_aborted(const Context& c, const CallState& state) {
  if (state.failed) return false;
  if (state.unsettled == 0) return true;
  bool good = true;
#pragma unroll 1
  for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x) {
    good = wait_for_flag(c, Flag::left, {.peer = peer, .phase = Phase::dispatch_credit, .call = state.unsettled, .timed = true}) && good;
  }
  good = __syncthreads_and(good) != 0;
  if (threadIdx.x == 0 && good) c.state->unsettled = 0;
  return good;
}

// Until peers have read this rank's expert rows (pull): behind the call they may be written again. By a whole block. Block-uniform.
__device__ inline bool wait_for_readers(const Context& c, const CallState& state) {
  bool good = true;
#pragma unroll 1
  for (int peer = threadIdx.x; state.last_pull != 0 && peer < c.ranks; peer += blockDim.x) {
    good = wait_for_flag(c, Flag::reads, {.peer = peer, .phase = Phase::combine_read, .call = state.last_pull, .timed = true}) && good;
  }
  return __syncthreads_and(good) != 0;
}
__device__ inline bool settle(const Context& c, const CallState& state) { return leave_aborted(c, state) && wait_for_readers(c, state); }

// True, in every thread, in the block of this kernel that comes here last: all others' work is visible to it, unless `ordered` is
// false, when no more is known than that they have got here (it saves the wait for their stores). Call it once per ticket and
// kernel, by all threads of all `blocks`.
__device__ inline bool is_last_block_of(std::uint32_t blocks, const Context& c, int ticket, bool ordered = true) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const std::uint32_t before = ordered ? ptx::add_acquire_release(&c.tickets[ticket], 1U) : atomicAdd(&c.tickets[ticket], 1U);
    last = before == blocks - 1;
    if (last) c.tickets[ticket] = 0;
  }
  __syncthreads();
  return last;
}
__device__ inline bool is_last_block(const Context& c, int ticket, bool ordered = true) {
  return is_last_block_of(gridDim.x * gridDim.y, c, ticket, ordered);
}

// Every block waits until all have come here, whose work is visible to it then. The grid is resident at once; the last block of the
// kernel resets the ticket.
__device__ inline void wait_for_blocks(const Context& c, int ticket) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::add_acquire_release(&c.tickets[ticket], 1U);
    while (ptx::load_acquire_local(&c.tickets[ticket]) < gridDim.x) {
    }
  }
  __syncthreads();
}

// Ends the call, in the last block of its last kernel. A call that has failed is left: peers may go on to the next one.
__device__ inline void end_call(const Context& c, bool failed, std::uint64_t call) {
  if (failed) {
    set_flag_everywhere(c, Flag::left, call);
    if (c.state->failed != 0) {
#pragma unroll 1
      for (int peer = threadIdx.x; peer < c.ranks; peer += blockDim.x)
        ptx::store_release(&mailbox(c, peer, c.rank).failed, c.state->failed);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) c.state->call = call;
}

}  // namespace tokenyard::cuda
