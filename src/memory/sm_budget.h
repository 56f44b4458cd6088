#pragma once
// Kernels that wait for peers must all fit on a GPU at once, or they wait for kernels that cannot start. Every exchange of this
// process takes its share of a device's multiprocessors here for as long as it lives.

#include <memory>

namespace tokenyard {

// wanted: multiprocessors, or 0 for `usual` of them, or what is left. UsageError when not even one is left, or fewer than wanted.
struct SmBudget {
  int multiprocessors = 0;
  std::shared_ptr<void> share;  // given back by its last owner
};
SmBudget take_sm_budget(int device, int wanted, int usual);

int multiprocessors_of(int device);

}  // namespace tokenyard
