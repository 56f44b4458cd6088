// Calls everything that is marked TY_HOST_DEVICE from a kernel: what compiles on the CPU must compile for a GPU. Never run.
// The CPU's unit tests say that the numbers are right.

#include "shared_headers.h"

namespace {

using namespace tokenyard;

__device__ std::int64_t placement_arithmetic(const placement_internal::TableView& table, std::uint32_t source_rank, std::uint32_t token) {
  const std::uint32_t packed = placement_internal::pack_instance(source_rank, token);
  const int replica = table.replica_for(0, source_rank, token);
  return placement_internal::instance_rank(packed) + placement_internal::instance_local(packed) + table.shards_of(0, replica)[0];
}

__device__ std::int64_t arena_arithmetic(const protocol::ArenaShape& shape) {
  return protocol::align_up(shape.record_bytes(), 16) + shape.partials_per_token() + shape.staging_rows() + shape.count_words() +
         shape.instance_word(1, 2);
}

__device__ float record_arithmetic(const protocol::Record& record) {
  return record.weights()[0] + static_cast<float>(record.source_token() + record.partial_slot() + record.local_ids()[0]);
}

__device__ float routing_arithmetic(float logit) {
  routing_internal::TopK best(2);
  best.insert(routing_internal::sigmoid(logit), 0);
  best.insert(routing_internal::exp_of_negative(-logit), 1);
  return best.scores[routing_internal::precedes(best.scores[0], best.ids[0], logit, 2) ? 0 : 1];
}

__device__ std::int64_t overflow_arithmetic(const protocol::ArenaShape& shape) {
  const protocol::CountLimits limits{.receive_rows = shape.receive_rows, .expert_capacity = 1, .expert_layout = true};
  protocol::ExpertTally tally;
  tally.add(limits, 0, shape.top_k);
  return protocol::find_overflow(limits, protocol::group_rows(limits, shape.ranks), tally).needed;
}

__device__ float quantise_arithmetic(float x) {
  const protocol::BlockScale scale = protocol::block_scale(protocol::amax_bits(x), ScaleFormat::ue8m0);
  return static_cast<float>(protocol::e4m3_bits(x * scale.factor) + scale.stored);
}

}  // namespace

extern "C" __global__ void shared_arithmetic(placement_internal::TableView table, protocol::ArenaShape shape, protocol::Record record,
                                             float logit, std::int64_t* out) {
  out[0] = placement_arithmetic(table, blockIdx.x, threadIdx.x);
  out[1] = arena_arithmetic(shape);
  out[2] = static_cast<std::int64_t>(record_arithmetic(record));
  out[3] = static_cast<std::int64_t>(routing_arithmetic(logit));
  out[4] = overflow_arithmetic(shape);
  out[5] = static_cast<std::int64_t>(quantise_arithmetic(logit));
}
