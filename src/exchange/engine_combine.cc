// The steps of a combine: fold what this rank's experts made of each token, return it, and sum what comes back.

#include <algorithm>
#include <bit>
#include <numeric>

#include "core/usage.h"
#include "exchange/engine.h"
#include "kernels/cpu/kernels.h"

namespace tokenyard::exchange_internal {
namespace {

// The rows of y that belong to a received row.
class LocalRows {
 public:
  LocalRows(const HandleState& handle, const ConstTensorView& y, std::int64_t max_tokens_per_rank)
      : handle_(handle), data_(static_cast<const std::byte*>(y.data)), dtype_(y.dtype), max_tokens_per_rank_(max_tokens_per_rank) {
    if (!y) return;
    elements_ = y.shape[y.ndim - 1];
    pitch_ = y.strides[y.ndim - 2] * size_of(y.dtype);
  }

  std::int64_t elements() const { return elements_; }
  Dtype dtype() const { return dtype_; }
  const std::byte* row(std::int64_t index) const { return data_ + index * pitch_; }
  const std::byte* expert_row(std::int64_t i, int k) const {
    const std::int32_t index = handle_.expert_row[i * handle_.top_k() + k];
    return index < 0 ? nullptr : row(index);
  }
  // token_major and rank_slots: the one row, which is already a partial sum.
  const std::byte* token_row(std::int64_t i, int source) const {
    return row(handle_.layout == Layout::token_major ? i : source * max_tokens_per_rank_ + handle_.received.source_token[i]);
  }
  // The partial sum of received row i over ks in [first, last), k ascending. weights: [N,K] or empty.
  void fold(std::int64_t i, int first, int last, const std::vector<float>& weights, void* out, bool stream) const {
    const void* rows[64];
    float terms[64];
    int count = 0;
    for (int k = first; k < last; ++k) {
      const std::byte* const from = expert_row(i, k);
      if (from == nullptr) continue;
      rows[count] = from;
      if (!weights.empty()) terms[count] = weights[i * handle_.top_k() + k];
      ++count;
    }
    cpu::fold({.rows = rows,
               .weights = weights.empty() ? nullptr : terms,
               .count = count,
               .dtype = dtype_,
               .elements = elements_,
               .out = out,
               .stream = stream});
  }

 private:
  const HandleState& handle_;
  const std::byte* data_;
  Dtype dtype_;
  std::int64_t max_tokens_per_rank_;
  std::int64_t elements_ = 0;
  std::int64_t pitch_ = 0;
};

// The order in which the partial sums of one token are added, and where groups end. Indices are entries of the plan.
struct SumOrder {
  std::vector<std::int64_t> entries;
  std::vector<int> group_ends;  // where there are groups
  // Sorts by (group, order); entries are ascending in rank to begin with.
  void arrange(const SendPlan& plan, std::int64_t token, Order order, const std::vector<int>& groups) {
    entries.resize(plan.token_begin[token + 1] - plan.token_begin[token]);
    std::iota(entries.begin(), entries.end(), plan.token_begin[token]);
    if (order == Order::rank_ascending && groups.empty()) return;
    auto group_of = [&](std::int64_t at) { return groups.empty() ? 0 : groups[plan.entries[at].rank]; };
    auto key_of = [&](std::int64_t at) {
      const int last_k = order == Order::topk ? std::bit_width(plan.entries[at].k_mask) : 0;
      return std::pair(group_of(at), last_k);
    };
    if (order == Order::topk || !groups.empty()) {
      std::stable_sort(entries.begin(), entries.end(), [&](std::int64_t a, std::int64_t b) { return key_of(a) < key_of(b); });
    }
    group_ends.clear();
    for (std::size_t i = 1; i <= entries.size(); ++i) {
      if (i == entries.size() || group_of(entries[i]) != group_of(entries[i - 1])) group_ends.push_back(static_cast<int>(i));
    }
  }
};

bool has_groups(const std::vector<int>& groups) {
  return std::any_of(groups.begin(), groups.end(), [](int group) { return group > 0; });
}

// Where entry `at` of this rank's own plan stands among its received rows.
std::int64_t own_row(const HandleState& handle, const SendEntry& entry) {
  return handle.mode == Mode::latency ? handle.received.source_begin[entry.rank] + entry.slot : entry.slot;
}

}  // namespace

CombineJob Engine::make_combine(const ConstTensorView& y, const Handle& handle, const CombineOptions& options, std::uint64_t call) {
  check_handle(*this, handle);
  check_combine(*this, y, *handle.state(), options);
  CombineJob job;
  job.y = y;
  job.handle = std::static_pointer_cast<const HandleState>(handle.state());
  job.options = options;
  job.header.call = call;
  job.header.placement_hash = job.handle->placement_hash;
  job.header.handle_call = job.handle->call;
  job.header.row_bytes = static_cast<std::uint32_t>(y.shape[y.ndim - 1] * size_of(y.dtype));
  job.header.operation = protocol::Operation::combine;
  job.header.layout = static_cast<std::uint8_t>(job.handle->layout);
  job.header.mode = static_cast<std::uint8_t>(job.handle->mode);
  job.header.top_k = static_cast<std::uint8_t>(job.handle->top_k());
  job.header.dtype = static_cast<std::uint8_t>(y.dtype);
  job.header.weighting = static_cast<std::uint8_t>(options.weighting);
  job.header.unfolded = options.fold ? 0 : 1;
  job.header.row_weights = options.row_weights ? 1 : 0;
  return job;
}

Expected<Combined> Engine::combine_steps(CombineJob& job) {
  const Span span(*this, "combine", job.header.call);
  if (auto begun = transport_->begin_call(job.header); !begun) return unexpected(begun.error());
  const HandleState& handle = *job.handle;
  const bool pullable = job.y && !handle.is_expert_layout() && !(handle.mode == Mode::latency && handle.layout == Layout::token_major) &&
                        job.y.strides[job.y.ndim - 2] == job.y.shape[job.y.ndim - 1];
  const CombineCall call{.header = job.header,
                         .handle = &handle,
                         .row_bytes = job.header.row_bytes,
                         .unfolded = !job.options.fold,
                         .y = job.y.data,
                         .pullable = pullable,
                         .shard_ordinals = placements_[handle.placement].shard_ordinals.data()};
  auto weights = fold_weights(job, call);
  if (!weights) return unexpected(weights.error());
  std::vector<float> row_gradient;
  if (job.gradient) differentiate(job, *weights, row_gradient);
  auto targets = transport_->begin_partials(call);
  if (!targets) return unexpected(targets.error());
  {
    const Span fold(*this, "combine fold", job.header.call);
    if (job.y && !targets->pulled) fold_remote(job, call, *targets, *weights);
    if (job.header.row_weights != 0) return_weights(job, *targets);
  }
  if (auto published = transport_->publish_partials(call, *targets); !published) return unexpected(published.error());
  auto sources = [&] {
    const Span wait(*this, "combine wait", job.header.call);
    return transport_->await_partials(call);
  }();
  if (!sources) return unexpected(sources.error());
  const Span sum(*this, "combine sum", job.header.call);
  Combined result;
  const std::int64_t tokens = handle.sent.num_tokens;
  const std::int64_t elements = job.y ? job.y.shape[job.y.ndim - 1] : 0;
  const std::int64_t row_part = job.options.out || !job.y ? 0 : protocol::align_up(tokens * job.header.row_bytes, 64);
  const std::int64_t weight_part = job.header.row_weights != 0 ? tokens * handle.top_k() * 4 : 0;
  const RowMemory memory = row_part + weight_part > 0 ? allocate_rows(row_part + weight_part) : RowMemory();
  result.memory = memory.data;
  if (job.y) {
    result.out = job.options.out ? job.options.out : TensorView(memory.data.get(), job.y.dtype, {tokens, elements});
    sum_tokens(job, call, *sources, *weights, result.out);
  }
  if (job.header.row_weights != 0) {
    result.combined_weights = TensorView(memory.data.get() + row_part, Dtype::float32, {tokens, handle.top_k()});
    sum_weights(job, *sources, result.combined_weights);
  }
  transport_->release_partials(call);
  return result;
}

// The weights of the received rows' terms, [N,K]; empty: unweighted.
Expected<std::vector<float>> Engine::fold_weights(const CombineJob& job, const CombineCall& call) {
  if (job.options.weighting == Weighting::at_expert) return job.handle->received.weights;
  if (job.options.weighting == Weighting::at_source) {
    const Span span(*this, "combine weights", job.header.call);
    return transport_->exchange_weights(call, job.options.source_weights);
  }
  return std::vector<float>();
}

void Engine::fold_remote(const CombineJob& job, const CombineCall& call, const RowTransport::PartialTargets& targets,
                         const std::vector<float>& weights) {
  const HandleState& handle = *job.handle;
  const LocalRows local(handle, job.y, shape_.max_tokens_per_rank);
  const ReceivedRows& received = handle.received;
  const int k = handle.top_k();
  const StoreChoice::Stores stores(store_choice_, received.size() * call.row_bytes);
  const bool stream = stores.stream_to_peers();
  constexpr std::int64_t kGrain = 8;
  // Every rank starts behind itself, so that no owner is written by all at once.
  for (int step = 1; step < shape_.ranks; ++step) {
    const int source = static_cast<int>((world_.rank() + step) % shape_.ranks);
    const std::int64_t first = received.source_begin[source];
    pool_.parallel_for(received.source_begin[source + 1] - first, kGrain, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = first + begin; i < first + end; ++i) {
        if (!handle.is_expert_layout()) {
          cpu::copy_row(targets.partials[i], local.token_row(i, source), call.row_bytes, stream);
        } else if (!call.unfolded) {
          local.fold(i, 0, k, weights, targets.partials[i], stream);
        } else {
          for (int j = 0; j < k; ++j) {
            if (targets.partials[i * k + j] != nullptr) local.fold(i, j, j + 1, weights, targets.partials[i * k + j], stream);
          }
        }
      }
      if (stream) cpu::stream_fence();
    });
  }
}

// Row weights of this rank's rows go beside the partial sums, one value per k.
void Engine::return_weights(const CombineJob& job, const RowTransport::PartialTargets& targets) const {
  const HandleState& handle = *job.handle;
  for (int source = 0; source < shape_.ranks; ++source) {
    for (std::int64_t i = handle.received.source_begin[source]; i < handle.received.source_begin[source + 1]; ++i) {
      for (int k = 0; targets.weights[i] != nullptr && k < handle.top_k(); ++k) targets.weights[i][k] = row_weight(job, i, source, k);
    }
  }
}

float Engine::row_weight(const CombineJob& job, std::int64_t i, int source, int k) const {
  const HandleState& handle = *job.handle;
  const float* const weights = job.options.row_weights.as<float>();
  if (handle.is_expert_layout()) {
    const std::int32_t row = handle.expert_row[i * handle.top_k() + k];
    return row < 0 ? 0.0F : weights[row];
  }
  const std::int64_t row = handle.layout == Layout::token_major ? i : source * shape_.max_tokens_per_rank + handle.received.source_token[i];
  return weights[row * handle.top_k() + k];
}

void Engine::sum_tokens(const CombineJob& job, const CombineCall& call, const RowTransport::PartialSources& sources,
                        const std::vector<float>& weights, const TensorView& out) {
  const HandleState& handle = *job.handle;
  const SendPlan& plan = handle.sent;
  const LocalRows local(handle, job.y, shape_.max_tokens_per_rank);
  const int k = handle.top_k();
  const int rank = world_.rank();
  const bool grouped = has_groups(options_.reduction_groups);
  const bool stream = cpu::should_stream(plan.num_tokens * call.row_bytes);
  static const std::vector<int> flat;
  constexpr std::int64_t kGrain = 4;
  pool_.parallel_for(plan.num_tokens, kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    SumOrder order;
    std::vector<const void*> partials;
    std::vector<std::byte> scratch((call.unfolded ? k : 1) * call.row_bytes);
    for (std::int64_t token = begin; token < end; ++token) {
      // Unfolded: k ascending, and for the shards of one k ranks ascending.
      const Order within = call.unfolded ? Order::rank_ascending : job.options.order;
      order.arrange(plan, token, within, grouped ? options_.reduction_groups : flat);
      partials.clear();
      for (int j = 0; j < (call.unfolded ? k : 1); ++j) {
        for (const std::int64_t at : order.entries) {
          const SendEntry& entry = plan.entries[at];
          if (call.unfolded && (entry.k_mask >> j & 1) == 0) continue;
          if (entry.rank != rank) {
            partials.push_back(sources.partials[call.unfolded ? at * k + j : at]);
          } else if (!handle.is_expert_layout()) {
            partials.push_back(local.token_row(own_row(handle, entry), rank));
          } else {
            std::byte* const own = scratch.data() + j * call.row_bytes;
            local.fold(own_row(handle, entry), call.unfolded ? j : 0, call.unfolded ? j + 1 : k, weights, own, false);
            partials.push_back(own);
          }
        }
      }
      cpu::reduce({.partials = partials.data(),
                   .count = static_cast<int>(partials.size()),
                   .group_ends = grouped ? order.group_ends.data() : nullptr,
                   .num_groups = grouped ? static_cast<int>(order.group_ends.size()) : 0,
                   .bias0 = job.options.bias0 ? job.options.bias0.row(token) : nullptr,
                   .bias1 = job.options.bias1 ? job.options.bias1.row(token) : nullptr,
                   .dtype = job.y.dtype,
                   .out_dtype = out.dtype,
                   .elements = local.elements(),
                   .out = out.row(token),
                   .stream = stream});
    }
    if (stream) cpu::stream_fence();
  });
}

// combined[t,k]: the weights that came back for (t,k), ranks ascending.
void Engine::sum_weights(const CombineJob& job, const RowTransport::PartialSources& sources, const TensorView& out) const {
  const HandleState& handle = *job.handle;
  const int k = handle.top_k();
  for (std::int64_t token = 0; token < handle.sent.num_tokens; ++token) {
    float* const sums = out.as<float>() + token * k;
    std::fill_n(sums, k, 0.0F);
    for (std::int64_t at = handle.sent.token_begin[token]; at < handle.sent.token_begin[token + 1]; ++at) {
      const SendEntry& entry = handle.sent.entries[at];
      for (int j = 0; j < k; ++j) {
        if ((entry.k_mask >> j & 1) == 0) continue;
        sums[j] += entry.rank == world_.rank() ? row_weight(job, own_row(handle, entry), entry.rank, j) : sources.weights[at][j];
      }
    }
  }
}

// The gradients of a weighted combine on the expert rank: of each row's weight, <g, y row>; of the row, w * g.
void Engine::differentiate(CombineJob& job, const std::vector<float>& weights, std::vector<float>& row_gradient) {
  const HandleState& handle = *job.handle;
  const int k = handle.top_k();
  const ConstTensorView& y = job.gradient->y;
  const LocalRows y_rows(handle, y, shape_.max_tokens_per_rank);
  const LocalRows g_rows(handle, job.gradient->grad_rows, shape_.max_tokens_per_rank);
  row_gradient.assign(handle.metadata.total_rows(), 0.0F);
  constexpr std::int64_t kGrain = 8;
  pool_.parallel_for(handle.received.size(), kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t at = begin * k; at < end * k; ++at) {
      const std::int32_t row = handle.expert_row[at];
      if (row < 0) continue;
      auto* const g = const_cast<std::byte*>(g_rows.row(row));  // grad_rows is ours to write
      row_gradient[row] = cpu::dot(g, y_rows.row(row), y.dtype, y_rows.elements());
      cpu::scale_row(g, g, weights[at], y.dtype, y_rows.elements());
    }
  });
  job.options.row_weights = ConstTensorView(row_gradient.data(), Dtype::float32, {static_cast<std::int64_t>(row_gradient.size())});
}

}  // namespace tokenyard::exchange_internal
