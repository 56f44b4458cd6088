#include "exchange/make_transport.h"

#include "core/usage.h"
#include "exchange/collective_transport.h"
#include "exchange/direct_transport.h"

namespace tokenyard::exchange_internal {

Expected<std::unique_ptr<RowTransport>> make_transport(const World& world, const ExchangeOptions& options,
                                                       const protocol::ArenaShape& shape, ThreadPool& pool) {
  if (options.device != Device::cpu) usage_error("device {}: this version exchanges on cpu only", name(options.device));
  if (options.transport == Transport::mpi) return CollectiveTransport::create(world, options, shape, pool);
  return DirectTransport::create(world, options, shape, pool);
}

}  // namespace tokenyard::exchange_internal
