#pragma once
// Random collective calls against what plain loops over the data of all ranks say, bit for bit.

#include <cstdint>

#include "tokenyard/collective.h"

namespace tokenyard::collective_test {

struct CheckOptions {
  std::uint64_t seed = 1;
  int rounds = 20;                  // of one call of each kind
  std::int64_t max_rows = 40;       // per count
  std::int64_t max_elements = 300;  // per row
  std::int64_t multiple_of = 1;     // elements per row, and of the gaps between rows
};

// Collective: all ranks pass the same options, and so know each other's data. Failures are gtest failures that print the seed.
void check_collectives(Collectives& collectives, const CheckOptions& options);

// TOKENYARD_SEED, or a fresh seed.
std::uint64_t test_seed();

}  // namespace tokenyard::collective_test
