#include "memory/sm_budget.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "core/usage.h"
#include "memory/cuda_error.h"

namespace tokenyard {
namespace {

std::mutex budget_mutex;
std::map<int, int> taken_by_device;

}  // namespace

int multiprocessors_of(int device) {
  int count = 0;
  cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading the number of multiprocessors");
  return count;
}

SmBudget take_sm_budget(int device, int wanted, int usual) {
  const int all = multiprocessors_of(device);
  const std::lock_guard lock(budget_mutex);
  int& taken = taken_by_device[device];
  const int left = all - taken;
  if (wanted < 0) usage_error("sm_budget = {}; choose 1 to {}, or 0 for the usual", wanted, all);
  const int granted = wanted != 0 ? wanted : std::clamp(usual, 1, std::max(left, 1));
  if (granted > left) {
    usage_error("sm_budget = {} on GPU {}: {} of its {} multiprocessors are taken by other exchanges of this process; choose at most {}",
                granted, device, taken, all, left);
  }
  taken += granted;
  return {granted, std::shared_ptr<void>(nullptr, [device, granted](void*) {
            const std::lock_guard given_back(budget_mutex);
            taken_by_device[device] -= granted;
          })};
}

}  // namespace tokenyard
