#include "layer/cuda_shards.h"

#include "layer/device_calls.h"

namespace tokenyard::layer_internal {

void CudaShards::gather_counts(const ConstTensorView& mine, const TensorView& counts, void* stream) {
  gather(mine, ones_, TensorView(counts.data, counts.dtype, {size(), 1}), stream);
}

void CudaShards::gather(const ConstTensorView& mine, const ConstTensorView& counts, const TensorView& all, void* stream) {
  made(owed_, [&] { ranks_.all_gather_v(mine, DeviceCounts{.counts = counts, .most = most_}, all, stream); });
}

void CudaShards::reduce(const ConstTensorView& all, const ConstTensorView& counts, const TensorView& mine, void* stream) {
  made(owed_, [&] { ranks_.reduce_scatter_v(all, DeviceCounts{.counts = counts, .most = most_}, mine, stream); });
}

void CudaShards::gather(const ConstTensorView& mine, std::span<const std::int64_t> counts, const TensorView& all, void* stream) {
  made(owed_, [&] { ranks_.all_gather_v(mine, counts, all, stream); });
}

void CudaShards::reduce(const ConstTensorView& all, std::span<const std::int64_t> counts, const TensorView& mine, void* stream) {
  made(owed_, [&] { ranks_.reduce_scatter_v(all, counts, mine, stream); });
}

void CudaShards::leave(const std::string& reason, void* stream) {
  while (owed_ > 0) {
    try {
      ranks_.abandon(reason, stream);
      --owed_;
    } catch (const TransportError& error) {  // of an earlier call, told once
      if (error.failure().kind != FailureKind::aborted) return;
    }
  }
}

}  // namespace tokenyard::layer_internal
