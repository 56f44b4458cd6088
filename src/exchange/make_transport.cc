#include "exchange/make_transport.h"

#include "core/usage.h"
#include "exchange/direct_transport.h"

namespace tokenyard::exchange_internal {

Expected<std::unique_ptr<RowTransport>> make_transport(const World& world, const ExchangeOptions& options,
                                                       const protocol::ArenaShape& shape, ThreadPool& pool) {
  if (options.transport == Transport::mpi) usage_error("transport = mpi is not part of this build");
  return DirectTransport::create(world, options, shape, pool);
}

}  // namespace tokenyard::exchange_internal
