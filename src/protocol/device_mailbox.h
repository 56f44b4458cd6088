#pragma once
// The flags of the exchange between GPUs. As on the host (mailbox.h), a rank waits only for words in its own arena, which
// the peer writes. Every flag holds the number of the last call for which it was set, above a few bits that it brings along:
// flags only grow, so nothing is reset between calls and a captured graph may be replayed. All are zero in a fresh arena.
// A peer is never a call ahead of a flag that this rank has yet to see: no call ends without something from every rank.

#include <cstdint>

#include "protocol/call.h"
#include "protocol/host_device.h"
#include "protocol/mailbox.h"

namespace tokenyard::protocol {

// Order in which a call sets them.
enum class Flag : std::uint8_t {
  begun,  // the writer has begun the call: its receive buffer (dispatch: offered_buffer) or staging (combine) may be written,
          // rows it offers for pulling are ready
  begun_odd,
  digest,  // of the header of its call; the header itself follows
  digest_odd,
  records,   // throughput dispatch: its records lie in the receive buffer
  rows,      // throughput dispatch: its rows and their scales lie there
  weights,   // combine, at_source: its weights lie in weights_in
  partials,  // combine: its partial sums (and row weights) lie in staging
  reads,     // combine by pull: it has read everything it wants from the receiver's expert rows
  left,      // it gave up the call: nothing of it is under way any more
};
constexpr int kFlags = 10;
// What brings something along has a word for even calls and one for odd calls of an exchange: a peer that has all it needs from this
// rank's first blocks begins the next call, and a block that comes late still finds what the peer said of this one.
constexpr TY_HOST_DEVICE Flag of_call(Flag even, std::uint64_t call) { return static_cast<Flag>(static_cast<int>(even) + call % 2); }

// 2^40 calls, a few months of the fastest ones.
constexpr int kFlagBits = 24;
constexpr TY_HOST_DEVICE std::uint64_t flag_word(std::uint64_t call, std::uint32_t bits = 0) { return call << kFlagBits | bits; }
constexpr TY_HOST_DEVICE std::uint64_t flag_call(std::uint64_t word) { return word >> kFlagBits; }

// What begun brings along: the receive buffer that a dispatch offers, and in latency mode how many tokens it sends.
constexpr int kBufferBits = 7;
constexpr int kNoBuffer = (1 << kBufferBits) - 1;  // a combine
constexpr std::int64_t kMostFlaggedTokens = (1 << (kFlagBits - kBufferBits)) - 1;
static_assert(kMaxDepth < kNoBuffer);
constexpr TY_HOST_DEVICE std::uint32_t offer(int buffer, std::int32_t tokens = 0) {
  return static_cast<std::uint32_t>(tokens) << kBufferBits | static_cast<std::uint32_t>(buffer);
}
constexpr TY_HOST_DEVICE int offered_buffer(std::uint64_t word) { return static_cast<int>(word & kNoBuffer); }
constexpr TY_HOST_DEVICE std::int32_t offered_tokens(std::uint64_t word) {
  return static_cast<std::int32_t>(word >> kBufferBits & kMostFlaggedTokens);
}

// A count of a throughput dispatch, with the lower half of the call's number: it needs no flag beside it. The last count in its place is
// of another call, and not of one 2^32 calls ago.
constexpr TY_HOST_DEVICE std::uint64_t count_word(std::uint64_t call, std::int32_t count) {
  return call << 32 | static_cast<std::uint32_t>(count);
}
constexpr TY_HOST_DEVICE bool is_count_of(std::uint64_t word, std::uint64_t call) {
  return static_cast<std::uint32_t>(word >> 32) == static_cast<std::uint32_t>(call);
}
constexpr TY_HOST_DEVICE std::int32_t count_in(std::uint64_t word) { return static_cast<std::int32_t>(word & 0xffffffffU); }

// One per (owner, writer), in the owner's arena.
struct alignas(128) DeviceMailbox {
  CallHeader headers[kRing];    // of call c at c % kRing; whole when it has the digest
  std::uint64_t flags[kFlags];  // by Flag; release: publishes what the flag says
  std::uint64_t failed;         // pack_failure() of the writer's sticky failure; 0: healthy
  std::uint64_t aborted;        // the last call that the writer rejected; the reason lies below (release)
  char reason[kReasonBytes];
};

// kind: a FailureKind, phase: a Phase, peer: whom the writer blames, or -1.
constexpr TY_HOST_DEVICE std::uint64_t pack_failure(std::uint32_t kind, std::uint32_t phase, int peer) {
  return static_cast<std::uint64_t>(peer + 1) << 32 | phase << 8 | (kind + 1);
}
constexpr TY_HOST_DEVICE std::uint32_t failure_kind(std::uint64_t packed) { return static_cast<std::uint32_t>(packed & 0xff) - 1; }
constexpr TY_HOST_DEVICE std::uint32_t failure_phase(std::uint64_t packed) { return static_cast<std::uint32_t>(packed >> 8 & 0xff); }
constexpr TY_HOST_DEVICE int failure_peer(std::uint64_t packed) { return static_cast<int>(packed >> 32) - 1; }

// What a rank tells everybody about itself; read by hosts, after a deadline, to find whom the chain of waits ends at.
struct alignas(128) DeviceBeacon {
  std::uint64_t call = 0;
  std::uint32_t phase = 0;
  std::uint32_t waiting_on = 0;  // peer + 1; 0: not waiting
};

// In a rank's own device memory; only its kernels touch it, one after the other on one stream.
struct alignas(64) DeviceState {  // of which a kernel reads the first words at once
  std::uint64_t call = 0;         // the last call that has ended
  std::uint64_t last_pull = 0;    // the last combine whose partial sums peers pulled from here
  std::uint64_t unsettled = 0;    // a call that failed with `aborted`: peers may not have left it yet
  std::uint64_t dead_call = 0;    // the call under way that has failed: its later kernels only end it
  std::uint64_t failed = 0;       // pack_failure() of the sticky failure; 0: healthy
  std::uint64_t invalid_ids = 0;  // of all dispatches so far
  std::uint64_t lost_ids = 0;
};

// One failure, in pinned host memory: written once by the device (`set` last, release at system scope), read by the host.
struct ErrorRecord {
  std::uint32_t set = 0;
  std::uint32_t kind = 0;   // FailureKind
  std::uint32_t phase = 0;  // Phase
  std::int32_t peer = -1;
  std::uint64_t call = 0;
  std::int64_t expected = 0;
  std::int64_t seen = 0;
  CallHeader mine;    // mismatch: what both ranks were doing
  CallHeader theirs;  // mismatch
};

// In pinned host memory: what the host tells kernels that wait.
struct StopWord {
  std::uint32_t lost_peer = 0;  // peer + 1 of a rank that ended; 0: none
};

}  // namespace tokenyard::protocol
