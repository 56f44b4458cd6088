#include "device/pattern_run.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "device/pattern.h"
#include "memory/cuda_buffer.h"
#include "memory/cuda_handle.h"

namespace tokenyard::device_test {

std::vector<std::uint8_t> fetch(const std::byte* from, std::size_t bytes) {
  std::vector<std::uint8_t> host(bytes);
  const auto stream = value_or_throw(borrow_cuda_stream());
  cuda_check(cudaMemcpyAsync(host.data(), from, bytes, cudaMemcpyDeviceToHost, stream.get()), "cudaMemcpyAsync");
  cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  return host;
}

void fill(std::byte* to, int value, std::size_t bytes) {
  const auto stream = value_or_throw(borrow_cuda_stream());
  cuda_check(cudaMemsetAsync(to, value, bytes, stream.get()), "cudaMemsetAsync");
  cuda_check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
}

bool all_are(const std::vector<std::uint8_t>& bytes, int value) {
  return std::all_of(bytes.begin(), bytes.end(), [&](std::uint8_t byte) { return byte == value; });
}

void exchange_patterns(World& world, const SymmetricMemory& memory, std::uint64_t rounds) {
  load_pattern();
  for (int rank = 0; rank < world.size(); ++rank) {
    EXPECT_TRUE(all_are(fetch(memory.view(rank), memory.bytes()), 0)) << "rank " << rank << " as rank " << world.rank() << " sees it";
  }
  const PinnedBuffer result = value_or_throw(make_pinned_buffer(sizeof(PatternResult)));
  const auto stream = value_or_throw(borrow_cuda_stream());
  PatternArgs args;
  for (int rank = 0; rank < world.size(); ++rank) args.arenas[rank] = memory.view(rank);
  args.rank = world.rank();
  args.ranks = world.size();
  args.share_bytes = (memory.bytes() - kFlagBytes) / world.size();
  args.timeout_ns = 20'000'000'000;
  args.result = result.as<PatternResult>();
  world.barrier();  // nobody looks for zeros any more
  for (args.round = 1; args.round <= rounds; ++args.round) launch_pattern(args, stream.get());
  cuda_check(cudaGetLastError(), "launching the pattern");
  cuda_check(cudaStreamSynchronize(stream.get()), "the pattern's kernels");
  EXPECT_EQ(args.result->timed_out_on, 0U) << "rank " << world.rank();
  EXPECT_EQ(args.result->differences, 0U) << "rank " << world.rank();
  world.barrier();
}

}  // namespace tokenyard::device_test
