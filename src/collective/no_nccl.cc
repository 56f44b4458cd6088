#include "collective/device_collectives.h"
#include "tokenyard/error.h"

namespace tokenyard::collective_internal {

std::unique_ptr<DeviceCollectives> make_nccl(const World&, const DeviceCollectiveOptions&) {
  throw UsageError("collectives over NCCL are not built in; configure with -DTY_CUDA=ON -DTY_NCCL=ON, which needs nothing of NCCL");
}

}  // namespace tokenyard::collective_internal
