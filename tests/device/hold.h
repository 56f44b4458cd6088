#pragma once
// Kernels that hold a stream, or a whole GPU, while a test looks at what goes on beside them. Each ends by itself after a time.

#include <cstdint>

struct CUstream_st;

namespace tokenyard::device_test {

// On the current device; loading later could wait for a kernel that waits for this one.
void load_hold();
// One thread, until *word (pinned) is not zero. The caller asks cudaGetLastError(), also below.
void launch_hold(const std::uint32_t* word, std::uint64_t longest_ns, CUstream_st* stream);
// Twice as many blocks as the current device runs at once, each for `ns`.
void launch_fill(std::uint64_t ns, CUstream_st* stream);

}  // namespace tokenyard::device_test
