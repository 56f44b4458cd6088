#pragma once
// Runs cases through the library and compares every output with the reference, bit for bit.

#include <vector>

#include "multirank/exchange_data.h"
#include "multirank/side.h"
#include "tokenyard/world.h"

namespace tokenyard::exchange_test {

// The part of one rank. Differences are gtest failures that print the case, the rank, the first differing place and both values.
void run_rank(const CaseData& data, World& world);
void run_rank(const CaseData& data, World& world, Side& side);

// All ranks of a case as threads of this process.
void run_threads(const Case& c);

}  // namespace tokenyard::exchange_test
