#pragma once
// What stands behind DeviceCollectives. Collective; options are not checked yet.

#include <memory>

#include "tokenyard/collective.h"

namespace tokenyard::collective_internal {

std::unique_ptr<DeviceCollectives> make_cuda_direct(const World& world, const DeviceCollectiveOptions& options);
std::unique_ptr<DeviceCollectives> make_nccl(const World& world, const DeviceCollectiveOptions& options);

}  // namespace tokenyard::collective_internal
