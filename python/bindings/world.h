#pragma once
// The world as Python holds it: the end of its last handle may wait for other ranks, so it comes without the GIL.

#include <memory>

#include "bindings.h"
#include "tokenyard/world.h"

namespace tokenyard::python {

class RankWorld {
 public:
  explicit RankWorld(World world) : held_(std::make_unique<World>(std::move(world))) {}
  const World& world() const { return *held_; }

 private:
  WithoutGil<World> held_;
};

}  // namespace tokenyard::python
