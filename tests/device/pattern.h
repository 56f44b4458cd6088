#pragma once
// A kernel that proves memory between GPUs: every rank writes a pattern into every rank's arena, says so with a flag, waits
// for the flags of all in its own arena, and checks what the others wrote.

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace tokenyard::device_test {

constexpr int kMostRanks = 16;
// An arena: written[kMostRanks] and checked[kMostRanks] (u64 each, by the writing rank), then a share of pattern for each writer.
constexpr std::size_t kFlagBytes = 4096;

struct PatternResult {
  std::uint64_t differences = 0;   // bytes
  std::uint64_t timed_out_on = 0;  // peer + 1; 0: nobody
};

struct PatternArgs {
  std::byte* arenas[kMostRanks] = {};
  int rank = 0;
  int ranks = 1;
  std::size_t share_bytes = 0;
  std::uint64_t round = 1;  // from 1, ascending
  std::uint64_t timeout_ns = 0;
  PatternResult* result = nullptr;  // device or pinned; added to
};

// The kernel, loaded: loading it later could wait for a kernel that waits for this one.
void load_pattern();
void launch_pattern(const PatternArgs& args, CUstream_st* stream);

}  // namespace tokenyard::device_test
