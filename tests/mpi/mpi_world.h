#pragma once

#include "tokenyard/world.h"

namespace tokenyard::mpi_test {

// All ranks that mpirun started.
World& world();

}  // namespace tokenyard::mpi_test
