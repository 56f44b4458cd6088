#include "collective/device_collectives.h"

#include "core/usage.h"

namespace tokenyard {
namespace {

// The same on all ranks: whether ranks share a host is.
Transport choose(const World& world, Transport wanted) {
  if (wanted != Transport::automatic) return wanted;
  for (int peer = 0; peer < world.size(); ++peer) {
    if (world.link(peer) == LinkKind::network) return Transport::nccl;
  }
  return Transport::cuda_peer;
}

}  // namespace

std::unique_ptr<DeviceCollectives> DeviceCollectives::create(const World& world, const DeviceCollectiveOptions& options) {
  DeviceCollectiveOptions chosen = options;
  chosen.transport = choose(world, options.transport);
  if (options.nccl_communicator != nullptr && chosen.transport != Transport::nccl_window)
    usage_error("nccl_communicator is given, and transport {} uses none; use transport nccl_window", name(chosen.transport));
  switch (chosen.transport) {
    case Transport::cuda_peer:
    case Transport::nccl_window:
      return collective_internal::make_cuda_direct(world, chosen);
    case Transport::nccl:
      return collective_internal::make_nccl(world, chosen);
    default:
      usage_error("transport = {} for collectives on GPUs; use cuda_peer, nccl_window, nccl or automatic", name(options.transport));
  }
}

}  // namespace tokenyard
