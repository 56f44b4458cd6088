#pragma once

#include <memory>
#include <string>

#include "tokenyard/collective.h"

namespace tokenyard::collective_internal {

// Why this world cannot use MPI, and the remedy; empty when it can.
std::string mpi_objection(const World& world);

// Over MPI, as plainly as its library is used by others: nothing is agreed before a call, so that it serves as the baseline of
// benchmarks. Ranks that make different calls learn it from their deadline, and a failure or a rejected call is final.
std::unique_ptr<Collectives> make_mpi(const World& world, const CollectiveOptions& options);

}  // namespace tokenyard::collective_internal
