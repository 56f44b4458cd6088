#include "tokenyard/collective.h"
#include "tokenyard/error.h"

namespace tokenyard {

std::unique_ptr<DeviceCollectives> DeviceCollectives::create(const World&, const DeviceCollectiveOptions&) {
  throw UsageError("collectives on GPUs are not built in; configure with -DTY_CUDA=ON -DTY_NCCL=ON, which needs nothing of NCCL");
}

}  // namespace tokenyard
