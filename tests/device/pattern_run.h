#pragma once
// Memory that ranks share, tried by kernels of all ranks, and looked at from the host.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "memory/symmetric_memory.h"

namespace tokenyard::device_test {

// Bytes of device memory, on the host. Copies on a stream of its own: the default one would wait for other ranks' kernels.
std::vector<std::uint8_t> fetch(const std::byte* from, std::size_t bytes);
void fill(std::byte* to, int value, std::size_t bytes);
bool all_are(const std::vector<std::uint8_t>& bytes, int value);

// Kernels of all ranks write into all arenas, which are zero before, and wait for each other.
void exchange_patterns(World& world, const SymmetricMemory& memory, std::uint64_t rounds);

}  // namespace tokenyard::device_test
