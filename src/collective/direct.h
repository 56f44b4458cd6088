#pragma once

#include <memory>

#include "tokenyard/collective.h"

namespace tokenyard::collective_internal {

// Over peer-addressable memory: automatic, inproc or shm. Options are checked and agreed.
std::unique_ptr<Collectives> make_direct(const World& world, const CollectiveOptions& options);

}  // namespace tokenyard::collective_internal
