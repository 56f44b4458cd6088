#pragma once
// docs/expert_tp.md: one batch of an EP 2 x TP 2 layer, stage by stage, with the numbers that the library computes.

#include <string>

#include "layer/expert_tp_walk.h"

namespace tokenyard::testing {

std::string expert_tp_page(const walk::Seen& by_virtual, const walk::Seen& by_gathered);

}  // namespace tokenyard::testing
