#pragma once
// The flags of the exchange. Every word that a rank waits for lies in its own arena and is written by the peer: waiting
// never reads across a link. All are zero in a fresh arena. Words are accessed through load_acquire / store_release of
// protocol/flags.h; plain fields of a Message are published by its `sequence`.

#include <cstdint>

#include "protocol/call.h"

namespace tokenyard::protocol {

constexpr int kMaxDepth = 16;  // receive buffers of an exchange
constexpr int kRing = 4;       // calls whose messages may coexist; ranks are never more than one call apart
constexpr int kAborts = 8;     // rejected calls that are remembered
constexpr int kReasonBytes = 240;

enum class MessageKind : std::uint8_t { counts, rows, weights, partials };
constexpr int kMessageKinds = 4;

struct alignas(64) Message {
  CallHeader header;
  std::int64_t count = 0;      // rows: how many records the sender wrote
  std::uint32_t pulled = 0;    // partials: they lie in the sender's expert rows instead of the receiver's staging
  std::uint64_t sequence = 0;  // the call number; release: publishes the fields above and the payload
};

// One per (receiver, sender), in the receiver's arena.
struct alignas(64) Mailbox {
  Message messages[kMessageKinds][kRing];
  // Written by a destination for the source that owns this arena: receive epoch e may be written into the granted
  // buffer. Word e % kMaxDepth holds pack_grant(e, buffer).
  std::uint64_t grants[kMaxDepth];
  std::uint64_t staging_free;  // the last combine call whose staging slots the owner has read
  std::uint64_t read_done;     // the last combine call for which the owner has read this rank's expert rows
  std::uint64_t left;          // the last call the peer has left, however it ended
};

constexpr std::uint64_t pack_grant(std::uint64_t epoch, int buffer) { return (epoch + 1) << 8 | static_cast<std::uint64_t>(buffer); }
constexpr bool is_grant_for(std::uint64_t word, std::uint64_t epoch) { return word >> 8 == epoch + 1; }
constexpr int granted_buffer(std::uint64_t word) { return static_cast<int>(word & 0xff); }

struct alignas(64) AbortRecord {
  std::uint64_t call = 0;  // release: publishes the reason
  char reason[kReasonBytes];
};

// What a rank tells everybody who asks; the only memory that is read across a link, and only by a wait that lasts.
struct alignas(64) Beacon {
  std::uint64_t call = 0;
  std::uint32_t phase = 0;
  std::uint32_t waiting_on = 0;    // peer + 1; 0: not waiting
  std::uint64_t heartbeat_ns = 0;  // CLOCK_MONOTONIC of the last sign of life while waiting: a stopped rank has an old one
  std::uint64_t failed = 0;        // 1: the fields below say why (release)
  std::uint32_t failed_kind = 0;
  std::uint32_t failed_phase = 0;
  std::uint32_t failed_peer = 0;  // peer + 1
  char failed_detail[kReasonBytes];
  AbortRecord aborts[kAborts];  // of call c: index c % kAborts
};

}  // namespace tokenyard::protocol
