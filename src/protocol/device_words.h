#pragma once
// The words through which kernels that wait for peers, and their host, tell each other how calls go.

#include <cstddef>
#include <cstdint>

#include "protocol/arena.h"
#include "protocol/device_mailbox.h"

namespace tokenyard::protocol {

// In pinned memory.
struct HostWords {
  ErrorRecord failure;        // by kernels; read it after `set`
  ErrorRecord abort;          // by kernels; read it after `set`
  StopWord stop;              // by the host
  char reason[kReasonBytes];  // by the host, for the kernel that rejects a call
};

constexpr int kTickets = 64;

// In the rank's own device memory.
struct OwnWords {
  DeviceState state;
  std::uint32_t tickets[kTickets];  // zero between kernels: the last block of a kernel resets what it used
};

constexpr int kNearRanks = 16;

// What every kernel knows that waits for peers.
struct WordsView {
  std::byte* const* arenas = nullptr;    // [ranks] in device memory: every rank's arena as this device addresses it
  std::byte* near_arenas[kNearRanks]{};  // the first of them: a kernel has its arguments at hand, the table is a trip to the L2 cache
  ArenaLayout layout;
  int rank = 0;
  int ranks = 1;
  std::uint64_t timeout_ns = 0;
  DeviceState* state = nullptr;
  std::uint32_t* tickets = nullptr;  // [kTickets]
  ErrorRecord* failure = nullptr;    // pinned: sticky failures
  ErrorRecord* abort = nullptr;      // pinned: aborted calls
  const StopWord* stop = nullptr;    // pinned
};

}  // namespace tokenyard::protocol
