#pragma once
// A copy in host memory of what a dispatch on a GPU received, for those who check or print it.

#include "tokenyard/exchange.h"

namespace tokenyard::exchange_internal {

// Waits for `stream`, that of the dispatch. num_rows() is known in the copy; with Sizing::capacity its shapes stay the bounds.
Received to_host(const Received& received, void* stream);

}  // namespace tokenyard::exchange_internal
