#pragma once
// Chooses the way rows move. `automatic` picks the best that serves this world and logs it; an explicit choice that is
// not possible is a UsageError, never a silent fallback.

#include "core/thread_pool.h"
#include "exchange/row_transport.h"

namespace tokenyard::exchange_internal {

// Collective.
Expected<std::unique_ptr<RowTransport>> make_transport(const World& world, const ExchangeOptions& options,
                                                       const protocol::ArenaShape& shape, ThreadPool& pool);

}  // namespace tokenyard::exchange_internal
