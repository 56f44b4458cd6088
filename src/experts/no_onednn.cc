#include "core/usage.h"
#include "experts/sgemm.h"

namespace tokenyard::experts_internal {

void multiply(const Product&) {
  usage_error("this build has no matrix products on CPUs; configure with -DTY_ONEDNN=ON (Debian package libdnnl-dev)");
}

}  // namespace tokenyard::experts_internal
