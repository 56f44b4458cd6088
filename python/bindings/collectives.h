#pragma once
// The collectives as Python holds them: their end may wait for other ranks, so it comes without the GIL.

#include "bindings.h"
#include "tokenyard/collective.h"

namespace tokenyard::python {

struct HeldCollectives {
  WithoutGil<Collectives> collectives;
};
struct HeldDeviceCollectives {
  WithoutGil<DeviceCollectives> collectives;
};

}  // namespace tokenyard::python
