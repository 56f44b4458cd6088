#include "layer/device_workspace.h"

#include <numeric>

#include "core/usage.h"
#include "kernels/cuda/kernels.h"
#include "layer/cuda/kernels.h"
#include "memory/sm_budget.h"

namespace tokenyard::layer_internal {
namespace {

int device_of(const ExpertGroupOptions& options, const Exchange* exchange) {
  if (exchange != nullptr) return exchange->options().device_index;
  int devices = 0, device = options.device_index;
  cuda_check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  if (device == -1) cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  if (device < 0 || device >= devices)
    usage_error("device_index = {}; CUDA sees {} GPUs here: choose one of them, or -1 for the current one", device, devices);
  return device;
}

// Rows that a rank has for the experts of its own and other shards.
std::int64_t rows_of(const ExpertGroupOptions& options, const Exchange* exchange) {
  return exchange != nullptr ? exchange->options().receive_rows : options.max_tokens_per_rank;
}

// Nobody counts the places of gathered rows before they are computed: there is room for all that may be.
std::int64_t places_of(const ExpertGroupOptions& options, const Exchange* exchange, int shards) {
  const bool gathers = shards > 1 && !options.same_tokens;
  if (exchange != nullptr && !gathers) return exchange->options().max_expert_rows;
  return (gathers ? shards : 1) * rows_of(options, exchange) * options.top_k;
}

DeviceBuffer elements(int device, std::int64_t count, std::size_t size) {
  return value_or_throw(make_device_buffer(device, static_cast<std::size_t>(count) * size));
}

}  // namespace

DeviceWorkspace::DeviceWorkspace(const ExpertGroupOptions& options, const Exchange* exchange, int shards)
    : device_(device_of(options, exchange)),
      multiprocessors_(multiprocessors_of(device_)),
      places_count_(places_of(options, exchange, shards)),
      experts_({.device = device_}),
      trace_(options.trace) {
  const CudaDeviceScope scope(device_);
  cuda::preload_kernels();
  const std::int64_t tokens = options.max_tokens_per_rank, experts = options.num_experts;
  const std::size_t row_bytes = static_cast<std::size_t>(options.hidden_size) * static_cast<std::size_t>(size_of(options.dtype));
  logits_ = elements(device_, tokens * experts, sizeof(float));
  ids_ = elements(device_, tokens * options.top_k, sizeof(std::int32_t));
  weights_ = elements(device_, tokens * options.top_k, sizeof(float));
  load_ = elements(device_, experts, sizeof(std::int64_t));
  gate_parts_ = elements(device_, layer_cuda::gate_parts_bytes(multiprocessors_), 1);
  places_ = elements(device_, places_count_, row_bytes);
  shared_ = elements(device_, tokens, row_bytes);
  if (exchange == nullptr || shards > 1) sums_ = elements(device_, rows_of(options, exchange), row_bytes);
  if (shards > 1) make_shards(options, rows_of(options, exchange), shards);
  if (options.dense_tp > 1) {
    const std::int64_t rows = options.dense_tp * tokens;
    dense_ = {.gathered_rows = elements(device_, rows, row_bytes),
              .partial_rows = elements(device_, rows, row_bytes),
              .numbers = elements(device_, options.dense_tp + 1, sizeof(std::int32_t)),
              .ranks = options.dense_tp};
  }
  if (options.gradients) {
    blocks_ = std::make_shared<exchange_internal::BlockPool>(device_);
    gradients_ = {.places = elements(device_, places_count_, row_bytes),
                  .place_weights = elements(device_, places_count_, sizeof(float)),
                  .rows = elements(device_, tokens, row_bytes),
                  .y = elements(device_, tokens, row_bytes),
                  .of_gate = elements(device_, tokens * options.hidden_size, sizeof(float)),
                  .logits = elements(device_, tokens * experts, sizeof(float)),
                  .weights = elements(device_, tokens * options.top_k, sizeof(float)),
                  .shared_logits = elements(device_, tokens, sizeof(float))};
  }
  std::vector<std::int32_t> numbers(static_cast<std::size_t>(tokens) + 1);
  std::iota(numbers.begin(), numbers.end(), 0);
  numbers_ = elements(device_, tokens + 1, sizeof(std::int32_t));
  zeros_ = elements(device_, experts + 1, sizeof(std::int32_t));
  const char* const what = "preparing the memory of a group";
  cuda_check(cudaMemcpy(numbers_.data(), numbers.data(), numbers_.bytes(), cudaMemcpyHostToDevice), what);
  for (const DeviceBuffer* buffer : {&zeros_, &shared_, &dense_.numbers}) {
    if (buffer->bytes() > 0) cuda_check(cudaMemset(buffer->data(), 0, buffer->bytes()), what);
  }
  cuda_check(cudaDeviceSynchronize(), what);
}

void DeviceWorkspace::make_shards(const ExpertGroupOptions& options, std::int64_t most, int count) {
  const std::size_t row_bytes = static_cast<std::size_t>(options.hidden_size) * static_cast<std::size_t>(size_of(options.dtype));
  const std::int64_t all = options.same_tokens ? most : count * most, terms = all * options.top_k;
  shards_.count = count;
  shards_.most_of_all = all;
  shards_.partial = elements(device_, all, row_bytes);
  if (options.gradients || !options.same_tokens) {
    shards_.rows = elements(device_, all, row_bytes);
    shards_.weights = elements(device_, terms, sizeof(float));
  }
  if (options.gradients) shards_.own_weights = elements(device_, most * options.top_k, sizeof(float));
  if (options.same_tokens) return;
  shards_.ids = elements(device_, terms, sizeof(std::int32_t));
  shards_.counts = elements(device_, count, sizeof(std::int32_t));
}

CudaGathered DeviceWorkspace::gathered(Dtype dtype, std::int64_t columns, std::int64_t top_k) const {
  const std::int64_t all = shards_.most_of_all;
  return {.rows = {shards_.rows.data(), dtype, {all, columns}},
          .ids = {shards_.ids.data(), Dtype::int32, {all, top_k}},
          .weights = {shards_.weights.data(), Dtype::float32, {all, top_k}},
          .counts = {shards_.counts.data(), Dtype::int32, {shards_.count}}};
}

DeviceRouting DeviceWorkspace::routing(std::int64_t tokens, std::int64_t experts, std::int64_t top_k) const {
  return {.topk_ids = {ids_.data(), Dtype::int32, {tokens, top_k}},
          .topk_weights = {weights_.data(), Dtype::float32, {tokens, top_k}},
          .load = {load_.data(), Dtype::int64, {experts}}};
}

DeviceRowGroups DeviceWorkspace::all_rows(std::int64_t tokens) const {
  return {
      .places = tokens, .counts = {numbers_.as<std::int32_t>() + tokens, Dtype::int32, {1}}, .begins = {zeros_.data(), Dtype::int32, {1}}};
}

DeviceRowGroups DeviceWorkspace::first_rows(const ConstTensorView& count, std::int64_t places) const {
  return {.places = places, .counts = count, .begins = {zeros_.data(), Dtype::int32, {1}}};
}

DeviceRowGroups DeviceWorkspace::no_rows(std::int64_t places, int num_groups) const {
  const ConstTensorView zeros(zeros_.data(), Dtype::int32, {num_groups});
  return {.places = places, .counts = zeros, .begins = zeros};
}

std::shared_ptr<DeviceWorkspace> make_device_workspace(const ExpertGroupOptions& options, const Exchange* exchange, int shards) {
  return std::make_shared<DeviceWorkspace>(options, exchange, shards);
}

int device_of(const DeviceWorkspace& workspace) { return workspace.device(); }

std::vector<PhaseSpan> take_spans(DeviceWorkspace& workspace) {
  const CudaDeviceScope scope(workspace.device());
  return workspace.trace().take();
}

}  // namespace tokenyard::layer_internal
