#pragma once
// What of topo is about GPUs.

#include "tokenyard/topo.h"

namespace tokenyard {

// Memory between GPUs: whether this build and this machine have it.
Backend cuda_peer_backend();

}  // namespace tokenyard
