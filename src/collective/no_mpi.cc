#include "collective/mpi.h"
#include "tokenyard/error.h"

namespace tokenyard::collective_internal {

std::string mpi_objection(const World&) {
  return "transport mpi is not built in; install an MPI (Debian: libopenmpi-dev) and configure with -DTY_MPI=ON, or use transport "
         "automatic";
}

std::unique_ptr<Collectives> make_mpi(const World& world, const CollectiveOptions&) { throw UsageError(mpi_objection(world)); }

}  // namespace tokenyard::collective_internal
