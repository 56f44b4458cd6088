#pragma once
// What holds in every parallel configuration, in the order in which it is checked.

#include <optional>
#include <string>

#include "tokenyard/parallel.h"

namespace tokenyard::parallel_internal {

constexpr int kMaxSize = 65535;  // ranks of a placement

// An invariant that does not hold.
struct Broken {
  int index = 0;  // how many invariants before it hold: of two failures, the higher one came further
  std::string text;
};
std::optional<Broken> first_broken(const ParallelConfig& config);

}  // namespace tokenyard::parallel_internal
