// Built instead of cuda_direct.cc without TY_CUDA.

#include "collective/device_collectives.h"
#include "tokenyard/error.h"

namespace tokenyard::collective_internal {

std::unique_ptr<DeviceCollectives> make_cuda_direct(const World&, const DeviceCollectiveOptions&) {
  throw UsageError(
      "collectives on GPUs are not built in; configure with -DTY_CUDA=ON (needs the CUDA toolkit, 12.4 or newer), or use Collectives on "
      "CPUs");
}

}  // namespace tokenyard::collective_internal
