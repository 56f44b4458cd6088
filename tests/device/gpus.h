#pragma once
// What tests on GPUs need to know of the machine. Without a GPU they are skipped, which is not passed.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <string>

namespace tokenyard::device_test {

int gpu_count();

// Makes this rank's GPU current, rank r on GPU r % gpu_count(), and returns it.
int use_gpu_of(int rank);

// SMs that kernels of one of `ranks` rank threads may hold while they wait for peers, so that those of all ranks fit.
int sm_budget_of(int gpu, int ranks);

// What a leak would change. The first look at a GPU makes a context there, which takes memory.
std::size_t open_descriptors();
std::size_t free_on_all_gpus();

// Why a backend of `tokenyard topo` cannot be used here, and what to do; empty: it can.
std::string why_not(const std::string& backend);

class OnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (gpu_count() == 0) GTEST_SKIP() << "no GPU here";
  }
};

// With memory in windows of NCCL, which takes one rank per GPU.
class OnWindows : public OnGpu {
 protected:
  void SetUp() override {
    OnGpu::SetUp();
    if (IsSkipped()) return;
    if (const std::string why = why_not("nccl_window"); !why.empty()) GTEST_SKIP() << why;
  }
  static int ranks() { return std::min(gpu_count(), 4); }
};
class OnWindowsOfSeveral : public OnWindows {
 protected:
  void SetUp() override {
    OnWindows::SetUp();
    if (!IsSkipped() && gpu_count() < 2) GTEST_SKIP() << "one GPU: NCCL takes one rank per GPU";
  }
};

}  // namespace tokenyard::device_test
