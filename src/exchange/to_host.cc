#include "exchange/to_host.h"

#include <cuda_runtime_api.h>

#include <cstring>

#include "exchange/exchange_engine.h"
#include "memory/cuda_error.h"

namespace tokenyard::exchange_internal {
namespace {

using Bytes = std::vector<std::byte>;

struct HostHandle final : HandleFacts {
  int top_k() const override { return k; }
  std::int64_t num_tokens() const override { return tokens; }
  std::int64_t num_token_rows() const override { return token_rows; }
  std::int64_t num_rows() const override { return layout_rows; }
  const std::vector<std::int64_t>& rows_shape() const override { return shape; }
  std::span<const std::int64_t> dropped() const override { return dropped_rows; }
  ReceivedViews views() const override { return copies; }

  int k = 1;
  std::int64_t tokens = 0;
  std::int64_t token_rows = 0;
  std::int64_t layout_rows = 0;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> dropped_rows;
  ReceivedViews copies;
  std::vector<Bytes> memory;
};

// The dense copy of a dense view.
template <class View>
View fetched(const View& view, std::vector<Bytes>& memory) {
  if (!view) return view;
  const auto bytes = static_cast<std::size_t>(view.num_elements() * size_of(view.dtype));
  Bytes& copy = memory.emplace_back(bytes + 1);  // an empty tensor has an address too
  cuda_check(cudaMemcpy(copy.data(), view.data, bytes, cudaMemcpyDefault), "copying received tensors to the host");
  View here = view;
  here.data = copy.data();
  return here;
}

}  // namespace

Received to_host(const Received& received, void* stream) {
  cuda_check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for a dispatch");
  const HandleFacts& from = *received.handle().state();
  auto handle = std::make_shared<HostHandle>();
  static_cast<HandleFacts&>(*handle) = from;
  handle->k = from.top_k();
  handle->tokens = from.num_tokens();
  handle->shape = from.rows_shape();
  const auto dropped = from.dropped();
  handle->dropped_rows.assign(dropped.begin(), dropped.end());
  ReceivedViews views = from.views();
  for (ConstTensorView* view : {&views.num_rows, &views.local_ids, &views.row_weights, &views.source_rank, &views.source_token,
                                &views.source_k, &views.expert_counts, &views.expert_offsets, &views.expert_rows, &views.rank_counts,
                                &views.sent_counts, &views.ranges, &views.present}) {
    *view = fetched(*view, handle->memory);
  }
  for (std::int64_t r = 0; r < views.rank_counts.num_elements(); ++r) handle->token_rows += views.rank_counts.as<std::int32_t>()[r];
  handle->layout_rows = views.num_rows ? views.num_rows.as<std::int32_t>()[0] : from.num_rows();
  handle->copies = views;
  auto state = std::make_shared<ReceivedState>();
  auto rows = std::make_shared<std::vector<Bytes>>();
  state->rows = fetched(received.rows(), *rows);
  state->scales = fetched(received.scales(), *rows);
  state->lease = rows;
  state->handle = Handle(handle);
  return Received(std::move(state));
}

}  // namespace tokenyard::exchange_internal
