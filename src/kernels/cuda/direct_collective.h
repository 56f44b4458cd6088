#pragma once
// Collectives over peer memory, as the host starts them: one kernel a call, ordered like those of an exchange (kernels.h).

#include "kernels/cuda/context.h"
#include "protocol/lanes.h"
#include "tokenyard/dtype.h"

namespace tokenyard::cuda {

constexpr int kMostCollectiveRanks = 64;  // their spans travel with the kernel

enum class DirectOperation : std::uint8_t { all_gather_v, reduce_scatter_v, all_to_all_v };

// Rows of a tensor, in bytes: rows lie `stride` apart.
template <class Byte>
struct RowTable {
  Byte* data = nullptr;
  std::int64_t stride = 0;
};
struct RowRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

struct DirectCollectiveArgs {
  Context context;
  protocol::LaneLayout lanes;
  DirectOperation operation = DirectOperation::all_gather_v;
  Dtype dtype = Dtype::uint8;  // reduce_scatter_v: float64, float32, bfloat16, float16
  RowTable<const std::byte> in;
  RowTable<std::byte> out;
  std::int64_t row_bytes = 0;
  bool keeps_own = false;  // this rank's own rows are copied from in to out
  int word_bytes = 1;      // 16, 4, 2 or 1: addresses, strides and row_bytes are multiples of it, and of an element to be summed
  int lanes_used = 1;      // those that have anything to do here
  RowRange send[kMostCollectiveRanks];
  RowRange receive[kMostCollectiveRanks];
  // Instead of both, of an all_gather_v or a reduce_scatter_v: rows of each rank that the device knows, most_rows of each at the most.
  const std::int32_t* counts = nullptr;
  std::int64_t most_rows = 0;
};

// Two blocks on each multiprocessor of as many as lanes_used.
void launch_direct_collective(const DirectCollectiveArgs& args, Stream stream);

}  // namespace tokenyard::cuda
