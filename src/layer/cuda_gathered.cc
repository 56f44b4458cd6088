// Shards of experts that meet beside the exchange, or without one: rows are gathered before, and partial sums reduced and scattered after.

#include "layer/cuda_calls.h"
#include "layer/steps.h"
#include "tokenyard/norm.h"

namespace tokenyard::layer_internal {

CudaGathered CudaMoe::gathered_in(const CudaStep* step, Dtype dtype) const {
  return step != nullptr ? step->gathered : workspace().gathered(dtype, gate_.hidden_size(), gate_.gate().top_k);
}

void CudaMoe::place(CudaGathered& gathered, StepMemory& memory, Dtype dtype) const {
  const std::int64_t all = shards_->most_of_all(), top_k = gate_.gate().top_k;
  memory.place(gathered.rows, dtype, {all, gate_.hidden_size()});
  memory.place(gathered.ids, Dtype::int32, {all, top_k});
  memory.place(gathered.weights, Dtype::float32, {all, top_k});
  memory.place(gathered.counts, Dtype::int32, {shards_->size()});
}

TensorView CudaMoe::run_shards(const Forward& of, const Received& received) {
  const TensorView rows = received.rows();
  const ConstTensorView number(received.num_rows_device().data, Dtype::int32, {1, 1});
  const TensorView sums = workspace().sums(rows.dtype, rows.shape[0], rows.shape[1]);
  fold_gathered(of, {rows, received.local_ids(), received.row_weights()}, number, sums);
  return sums;
}

void CudaMoe::fold_gathered(const Forward& of, const ExpertRows& mine, const ConstTensorView& number, const TensorView& sums) {
  const cudaStream_t stream = stream_of(of.options.stream);
  const CudaGathered all = gathered_in(of.step, sums.dtype);
  {
    const Phase phase(workspace().trace(), "gather", 0, stream);
    fill(all.ids, kNoExpert, stream);
    shards_->gather_counts(number, all.counts, stream);
    shards_->gather(mine.rows, all.counts, all.rows, stream);
    shards_->gather(mine.local_ids, all.counts, all.ids, stream);
    shards_->gather(mine.row_weights, all.counts, all.weights, stream);
  }
  const TensorView partial = workspace().partial(sums.dtype, all.rows.shape[0], sums.shape[1]);
  fold_experts(of, {all.rows, all.ids, all.weights}, partial);
  const Phase phase(workspace().trace(), "reduce", 0, stream);
  shards_->reduce(partial, all.counts, sums, stream);
}

void CudaMoe::fold_slice(const Forward& of, const ExpertRows& input, const TensorView& sums) {
  const cudaStream_t stream = stream_of(of.options.stream);
  const std::int64_t tokens = input.rows.shape[0];
  const TensorView partial = workspace().partial(sums.dtype, tokens, sums.shape[1]);
  fold_experts(of, input, partial);
  const Phase phase(workspace().trace(), "reduce", 0, stream);
  shards_->reduce(partial, slice_counts(tokens, shards_->size()), sums, stream);
}

// As many rows as there can be, none of which has an expert.
void CudaMoe::rehearse_shards(void* stream) {
  const CudaGathered all = gathered_in(nullptr, dtype());
  fill(all.ids, kNoExpert, stream_of(stream));
  const MoeStepOptions options = {.stream = stream};
  fold_experts({all.rows, options}, {all.rows, all.ids, all.weights}, workspace().partial(dtype(), all.rows.shape[0], all.rows.shape[1]));
}

// Gradients of sums, and those of rows and weights back; of slices also those of all rows.
int CudaMoe::shard_calls_backward(const MoeStepOptions& options) const { return is_gathered() || !options.sliced_out ? 3 : 4; }

void CudaMoe::fold_backward(const CudaStep& step, const ExpertRows& input, const ConstTensorView& d_sums, const ExpertRowsGradient& d,
                            const ExpertGradients& gradients, void* stream) {
  if (num_local_experts_ == 0) {
    fill(d.rows, 0, stream_of(stream));
    return fill(d.row_weights, 0, stream_of(stream));
  }
  const Dtype dtype = d.rows.dtype;
  const std::int64_t hidden_size = d.rows.shape[1];
  DeviceExperts& experts = workspace().experts();
  const DeviceRowGroups groups = experts.gather(input.local_ids, num_local_experts_, stream);
  const TensorView d_y = workspace().places(dtype, groups.places, hidden_size);
  const TensorView d_places(workspace().gradients().places.data(), dtype, {groups.places, hidden_size});
  experts.unpermute_backward({step.y, input.local_ids, input.row_weights}, groups, d_sums, d_y, d.row_weights, stream);
  experts.experts_backward({.x = input.rows, .gate_up = step.gate_up, .dy = d_y, .dx = d_places, .gradients = gradients}, groups,
                           weights_.experts, activation_, stream);
  experts.unpermute({d_places, input.local_ids, {}}, groups, d.rows, stream);
}

void CudaMoe::gathered_backward(const CudaStep& step, const ConstTensorView& d_sums, const ExpertRowsGradient& d,
                                const ExpertGradients& gradients, void* stream) {
  const CudaGathered& of = step.gathered;
  const CudaGathered scratch = gathered_in(nullptr, d_sums.dtype);
  const ExpertRowsGradient d_all = {workspace().partial(d_sums.dtype, of.rows.shape[0], of.rows.shape[1]), scratch.weights};
  shards_->gather(d_sums, of.counts, scratch.rows, stream);
  fold_backward(step, {of.rows, of.ids, of.weights}, scratch.rows, d_all, gradients, stream);
  shards_->reduce(d_all.rows, of.counts, d.rows, stream);
  shards_->reduce(d_all.row_weights, of.counts, d.row_weights, stream);
}

ExpertRowsGradient CudaMoe::shards_backward(const CudaStep& step, const TensorView& g, const ExpertGradients& gradients, void* stream) {
  const ExpertRowsGradient d = {workspace().sums(g.dtype, g.shape[0], g.shape[1]),
                                {workspace().shards().own_weights.data(), Dtype::float32, {g.shape[0], gate_.gate().top_k}}};
  gathered_backward(step, g, d, gradients, stream);
  return d;
}

void CudaMoe::slice_backward(const MoeBackwardInput& input, const CudaStep& step, const ExpertRowsGradient& d,
                             const ExpertGradients& gradients) {
  void* const stream = input.options.stream;
  const std::vector<std::int64_t> counts = slice_counts(step.num_tokens, shards_->size());
  const DeviceWorkspace::Shards& memory = workspace().shards();
  const Dtype dtype = input.x.dtype;
  const std::int64_t tokens = step.num_tokens, hidden_size = input.x.shape[1];
  ConstTensorView d_sums = input.d_out;
  if (input.options.sliced_out) {
    const TensorView all(memory.rows.data(), dtype, {tokens, hidden_size});
    shards_->gather(input.d_out, counts, all, stream);
    d_sums = all;
  }
  const ExpertRowsGradient d_all = {workspace().partial(dtype, tokens, hidden_size),
                                    {memory.weights.data(), Dtype::float32, {tokens, gate_.gate().top_k}}};
  fold_backward(step, {input.x, step.routing.topk_ids, step.routing.topk_weights}, d_sums, d_all, gradients, stream);
  shards_->reduce(d_all.rows, counts, d.rows, stream);
  shards_->reduce(d_all.row_weights, counts, d.row_weights, stream);
}

std::int64_t CudaMoe::gathered_bytes() const {
  if (!is_gathered()) return 0;
  const std::int64_t of_ids = gate_.gate().top_k * (size_of(Dtype::int32) + size_of(Dtype::float32));
  return shards_->most_of_all() * (gate_.hidden_size() * size_of(dtype()) + of_ids);
}

}  // namespace tokenyard::layer_internal
