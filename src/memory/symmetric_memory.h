#pragma once
// Same-size memory on every rank of a link domain; view(rank) is a pointer valid in this process.

#include <cstddef>
#include <memory>

#include "core/deadline.h"
#include "core/expected.h"
#include "tokenyard/options.h"
#include "tokenyard/world.h"

namespace tokenyard {

class SymmetricMemory {
 public:
  // Collective. Zero-filled, 4096-byte aligned. automatic: inproc for rank threads, shm for processes; an explicit
  // transport that cannot serve this world is a UsageError. Failures name the rank that did not arrive.
  static Expected<std::unique_ptr<SymmetricMemory>> create(const World& world, std::size_t bytes, Transport transport, Deadline deadline);
  virtual ~SymmetricMemory() = default;  // local; peers' mappings of this rank's memory stay valid

  virtual std::byte* view(int rank) const = 0;
  virtual std::size_t bytes() const = 0;
  virtual Transport transport() const = 0;  // inproc or shm
};

}  // namespace tokenyard
