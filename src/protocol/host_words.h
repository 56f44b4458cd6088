#pragma once
// Words in pinned memory through which kernels that wait for peers, and their host, tell each other what went wrong.

#include "protocol/device_mailbox.h"

namespace tokenyard::protocol {

struct HostWords {
  ErrorRecord failure;        // by kernels; read it after `set`
  ErrorRecord abort;          // by kernels; read it after `set`
  StopWord stop;              // by the host
  char reason[kReasonBytes];  // by the host, for the kernel that rejects a call
};

}  // namespace tokenyard::protocol
