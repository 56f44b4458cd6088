#include "reference/naive_exchange.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>
#include <type_traits>
#include <utility>

namespace tokenyard::naive {
namespace {

bool expert_layout(Layout layout) { return layout == Layout::expert_major || layout == Layout::expert_padded; }

const Copy& copy_for(const std::vector<Copy>& copies, int source, std::int64_t token_index) {
  std::uint32_t h = static_cast<std::uint32_t>(token_index) + 0x9e3779b9U * (static_cast<std::uint32_t>(source) + 1U);
  h = (h ^ (h >> 16)) * 0x85ebca6bU;
  h = (h ^ (h >> 13)) * 0xc2b2ae35U;
  h ^= h >> 16;
  std::uint32_t total = 0;
  for (const Copy& copy : copies) total += copy.share;
  std::uint32_t ticket = h % total;
  for (const Copy& copy : copies) {
    if (ticket < copy.share) return copy;
    ticket -= copy.share;
  }
  return copies.back();
}

// All (source, token, k) that reach `rank`, in that order; slots are not yet given.
std::vector<Term> terms_of(int rank, const Placement& placement, const std::vector<Input>& inputs, const DispatchSpec& spec) {
  const std::vector<int> locals = local_experts(placement, rank);
  std::vector<Term> terms;
  for (int source = 0; source < placement.ranks; ++source) {
    for (std::int64_t token = 0; token < inputs[source].tokens; ++token) {
      for (int k = 0; k < spec.top_k; ++k) {
        const std::int64_t id = inputs[source].ids[token * spec.top_k + k];
        if (id < 0 || id >= static_cast<std::int64_t>(placement.experts.size())) continue;
        const std::vector<int>& shards = copy_for(placement.experts[id], source, token + spec.token_base).shard_ranks;
        if (std::find(shards.begin(), shards.end(), rank) == shards.end()) continue;
        const auto local = std::find(locals.begin(), locals.end(), id) - locals.begin();
        terms.push_back({source, token, k, static_cast<int>(local), -1});
      }
    }
  }
  return terms;
}

float weight_of(const Input& input, std::int64_t token, int k, int top_k) {
  return input.weights.empty() ? 1.0F : input.weights[token * top_k + k];
}

// Copies the row, the scales and the source of a term to its slot.
void place_row(Output& out, const Term& term, const std::vector<Input>& inputs, const DispatchSpec& spec) {
  const Input& input = inputs[term.source];
  out.used[term.slot] = 1;
  std::memcpy(&out.rows[term.slot * spec.row_bytes], &input.rows[term.token * spec.row_bytes], spec.row_bytes);
  if (spec.scale_bytes > 0) {
    std::memcpy(&out.scales[term.slot * spec.scale_bytes], &input.scales[term.token * spec.scale_bytes], spec.scale_bytes);
  }
  if (!out.source_rank.empty()) {
    out.source_rank[term.slot] = term.source;
    out.source_token[term.slot] = static_cast<std::int32_t>(term.token);
  }
}

void allocate(Output& out, const DispatchSpec& spec) {
  out.used.assign(out.slots, 0);
  out.rows.assign(out.slots * spec.row_bytes, 0);
  out.scales.assign(out.slots * spec.scale_bytes, 0);
  const bool expert = expert_layout(spec.layout);
  out.row_weights.assign(out.slots * (expert ? 1 : spec.top_k), 0.0F);
  if (!expert) out.local_ids.assign(out.slots * spec.top_k, -1);
  if (expert) out.source_k.assign(out.slots, -1);
  if (spec.layout == Layout::rank_slots) return;
  out.source_rank.assign(out.slots, -1);
  out.source_token.assign(out.slots, -1);
}

// token_major and rank_slots: one row per (source, token).
void lay_out_tokens(Output& out, const std::vector<Input>& inputs, const DispatchSpec& spec) {
  std::int64_t next = -1;
  for (std::size_t i = 0; i < out.terms.size(); ++i) {
    Term& term = out.terms[i];
    const bool first = i == 0 || term.source != out.terms[i - 1].source || term.token != out.terms[i - 1].token;
    if (first) ++next;
    term.slot = spec.layout == Layout::rank_slots ? term.source * spec.max_tokens + term.token : next;
  }
  out.slots = spec.layout == Layout::rank_slots ? static_cast<std::int64_t>(inputs.size()) * spec.max_tokens : next + 1;
  out.num_rows = out.token_rows;
  allocate(out, spec);
  for (const Term& term : out.terms) {
    place_row(out, term, inputs, spec);
    out.local_ids[term.slot * spec.top_k + term.k] = term.local;
    for (int k = 0; k < spec.top_k; ++k) {
      out.row_weights[term.slot * spec.top_k + k] = weight_of(inputs[term.source], term.token, k, spec.top_k);
    }
  }
  if (spec.layout == Layout::rank_slots) {
    out.present = out.used;
    return;
  }
  out.expert_offsets.push_back(0);  // the gather map: rows grouped by local expert
  for (int local = 0; local < static_cast<int>(out.expert_counts.size()); ++local) {
    for (const Term& term : out.terms) {
      if (term.local == local) out.expert_rows.push_back(static_cast<std::int32_t>(term.slot));
    }
    out.expert_offsets.push_back(static_cast<std::int32_t>(out.expert_rows.size()));
  }
}

// expert_major and expert_padded: one row per term, grouped by local expert.
void lay_out_experts(Output& out, const std::vector<Input>& inputs, const DispatchSpec& spec) {
  const int locals = static_cast<int>(out.expert_counts.size());
  const int ranks = static_cast<int>(inputs.size());
  const bool padded = spec.layout == Layout::expert_padded;
  const std::int64_t width = spec.expert_capacity > 0 ? spec.expert_capacity : spec.receive_rows;
  const bool limited = padded || spec.expert_capacity > 0;
  std::int64_t group = 0;
  std::int64_t rows = 0;
  if (padded) out.ranges.assign(static_cast<std::size_t>(locals) * ranks * 2, 0);
  for (int local = 0; local < locals; ++local) {
    if (!padded) out.expert_offsets.push_back(static_cast<std::int32_t>(group));
    std::int64_t count = 0;
    for (int source = 0; source < ranks; ++source) {
      const std::int64_t begin = count;
      for (Term& term : out.terms) {
        if (term.local != local || term.source != source) continue;
        if (limited && count == width) {
          if (spec.drop)
            ++out.dropped[local];
          else
            out.overflow = true;
          continue;
        }
        term.slot = group + count++;
      }
      if (padded) {
        out.ranges[(static_cast<std::size_t>(local) * ranks + source) * 2] = static_cast<std::int32_t>(begin);
        out.ranges[(static_cast<std::size_t>(local) * ranks + source) * 2 + 1] = static_cast<std::int32_t>(count - begin);
      }
    }
    out.expert_counts[local] = static_cast<std::int32_t>(count);
    rows += count;
    group += padded ? width : (count + spec.alignment - 1) / spec.alignment * spec.alignment;
  }
  if (!padded) out.expert_offsets.push_back(static_cast<std::int32_t>(group));
  out.slots = group;
  out.num_rows = padded ? rows : group;
  allocate(out, spec);
  for (const Term& term : out.terms) {
    if (term.slot < 0) continue;
    place_row(out, term, inputs, spec);
    out.row_weights[term.slot] = weight_of(inputs[term.source], term.token, term.k, spec.top_k);
    out.source_k[term.slot] = term.k;
  }
}

// One token's terms on one rank, k ascending, dropped ones included: they keep their place in the order of ranks.
struct Contribution {
  int rank = 0;
  std::vector<Term> terms;
};
using TokenKey = std::pair<int, std::int64_t>;

std::map<TokenKey, std::vector<Contribution>> by_token(const std::vector<Output>& outputs) {
  std::map<TokenKey, std::vector<Contribution>> tokens;
  for (int rank = 0; rank < static_cast<int>(outputs.size()); ++rank) {
    for (const Term& term : outputs[rank].terms) {
      std::vector<Contribution>& contributions = tokens[{term.source, term.token}];
      if (contributions.empty() || contributions.back().rank != rank) contributions.push_back({rank, {}});
      contributions.back().terms.push_back(term);
    }
  }
  return tokens;
}

template <class Real>
using Row = std::vector<Real>;

// The arithmetic of combine in float32 (or float64 for float64 rows).
template <class Real>
class Summation {
 public:
  Summation(const Dispatched& dispatched, const std::vector<CombineInput>& inputs, const CombineSpec& spec)
      : dispatched_(dispatched), inputs_(inputs), spec_(spec) {}

  Row<Real> token(int source, std::int64_t token, std::vector<Contribution> contributions) const {
    if (spec_.order == Order::topk) {
      std::stable_sort(contributions.begin(), contributions.end(),
                       [](const Contribution& a, const Contribution& b) { return a.terms.back().k < b.terms.back().k; });
    }
    Row<Real> sum = plus(bias(inputs_[source].bias0, token), bias(inputs_[source].bias1, token));
    if (!spec_.fold) return unfolded(std::move(sum), contributions);
    if (std::set<int>(spec_.groups.begin(), spec_.groups.end()).size() >= 2) return grouped(std::move(sum), contributions);
    for (const Contribution& c : contributions) sum = plus(std::move(sum), partial(c));
    return sum;
  }

  // The weight of a term in the fold; nothing when rows are added as they are.
  std::optional<Real> weight(const Term& term) const {
    const int top_k = dispatched_.spec.top_k;
    if (spec_.weighting == Weighting::at_expert) return weight_of(dispatched_.inputs[term.source], term.token, term.k, top_k);
    if (spec_.weighting == Weighting::at_source) return inputs_[term.source].source_weights[term.token * top_k + term.k];
    return std::nullopt;
  }

 private:
  static Row<Real> plus(Row<Real> a, const Row<Real>& b) {
    for (std::size_t h = 0; h < a.size(); ++h) a[h] += b[h];
    return a;
  }
  Row<Real> rounded(Row<Real> row) const {
    for (Real& value : row) value = static_cast<Real>(round_to(spec_.dtype, value));
    return row;
  }
  Row<Real> row_at(const Bytes& rows, std::int64_t index) const {
    Row<Real> row(spec_.hidden_size);
    for (std::int64_t h = 0; h < spec_.hidden_size; ++h) {
      row[h] = static_cast<Real>(read(spec_.dtype, rows.data(), index * spec_.hidden_size + h));
    }
    return row;
  }
  Row<Real> bias(const Bytes& rows, std::int64_t token) const {
    return rows.empty() ? Row<Real>(spec_.hidden_size, Real(0)) : row_at(rows, token);
  }
  // acc = fma(w, y, acc), or acc + y.
  void add_term(Row<Real>& acc, int rank, const Term& term) const {
    if (term.slot < 0) return;
    const std::optional<Real> w = weight(term);
    const Row<Real> y = row_at(inputs_[rank].y, term.slot);
    for (std::size_t h = 0; h < acc.size(); ++h) acc[h] = w ? std::fma(*w, y[h], acc[h]) : acc[h] + y[h];
  }
  Row<Real> partial(const Contribution& c) const {
    if (!expert_layout(dispatched_.spec.layout)) return row_at(inputs_[c.rank].y, c.terms.front().slot);
    Row<Real> acc(spec_.hidden_size, Real(0));
    for (const Term& term : c.terms) add_term(acc, c.rank, term);
    return rounded(std::move(acc));
  }
  // Each group on its own, rounded; then groups ascending. A group that contributes nothing is not there.
  Row<Real> grouped(Row<Real> sum, const std::vector<Contribution>& contributions) const {
    std::map<int, Row<Real>> group_sums;
    for (const Contribution& c : contributions) {
      Row<Real>& group_sum = group_sums.try_emplace(spec_.groups[c.rank], spec_.hidden_size, Real(0)).first->second;
      group_sum = plus(std::move(group_sum), partial(c));
    }
    for (auto& [group, group_sum] : group_sums) sum = plus(std::move(sum), rounded(std::move(group_sum)));
    return sum;
  }
  // k ascending and, for the shards of one k, ranks ascending.
  Row<Real> unfolded(Row<Real> sum, const std::vector<Contribution>& contributions) const {
    std::map<std::pair<int, int>, const Term*> ordered;
    for (const Contribution& c : contributions) {
      for (const Term& term : c.terms) ordered[{term.k, c.rank}] = &term;
    }
    for (const auto& [place, term] : ordered) {
      Row<Real> acc(spec_.hidden_size, Real(0));
      add_term(acc, place.second, *term);
      sum = plus(std::move(sum), rounded(std::move(acc)));
    }
    return sum;
  }

  const Dispatched& dispatched_;
  const std::vector<CombineInput>& inputs_;
  const CombineSpec& spec_;
};

// [t,k] += the weight given for the row that holds it, ranks ascending.
std::vector<float> combined_weights(int source, const Dispatched& dispatched, const std::vector<CombineInput>& inputs) {
  const int top_k = dispatched.spec.top_k;
  std::vector<float> sums(dispatched.inputs[source].tokens * top_k, 0.0F);
  for (std::size_t rank = 0; rank < inputs.size(); ++rank) {
    for (const Term& term : dispatched.outputs[rank].terms) {
      if (term.source != source || term.slot < 0) continue;
      const std::int64_t at = expert_layout(dispatched.spec.layout) ? term.slot : term.slot * top_k + term.k;
      sums[term.token * top_k + term.k] += inputs[rank].row_weights[at];
    }
  }
  return sums;
}

template <class Real>
std::vector<CombineOutput> combine_in(const Dispatched& dispatched, const std::vector<CombineInput>& inputs, const CombineSpec& spec) {
  const Summation<Real> summation(dispatched, inputs, spec);
  const auto tokens = by_token(dispatched.outputs);
  std::vector<CombineOutput> outputs(inputs.size());
  for (int source = 0; source < static_cast<int>(inputs.size()); ++source) {
    const std::int64_t count = dispatched.inputs[source].tokens;
    outputs[source].out.resize(count * spec.hidden_size * bytes_of(spec.out_dtype));
    for (std::int64_t token = 0; token < count; ++token) {
      const auto found = tokens.find({source, token});
      const Row<Real> sum = summation.token(source, token, found == tokens.end() ? std::vector<Contribution>{} : found->second);
      for (std::int64_t h = 0; h < spec.hidden_size; ++h) {
        write(spec.out_dtype, outputs[source].out.data(), token * spec.hidden_size + h, sum[h]);
      }
    }
    if (spec.row_weights) outputs[source].combined_weights = combined_weights(source, dispatched, inputs);
  }
  return outputs;
}

template <class Real>
std::vector<CombineGradient> backward_in(const Dispatched& dispatched, const std::vector<Bytes>& grads,
                                         const std::vector<CombineInput>& inputs, const CombineSpec& spec) {
  const Summation<Real> summation(dispatched, inputs, spec);
  const std::int64_t row_bytes = spec.hidden_size * bytes_of(spec.dtype);
  const int top_k = dispatched.spec.top_k;
  std::vector<CombineGradient> gradients(inputs.size());
  for (std::size_t r = 0; r < inputs.size(); ++r) gradients[r].weights.assign(dispatched.inputs[r].tokens * top_k, 0.0F);
  for (std::size_t r = 0; r < inputs.size(); ++r) {
    gradients[r].rows.assign(dispatched.outputs[r].slots * row_bytes, 0);
    for (const Term& term : dispatched.outputs[r].terms) {
      if (term.slot < 0) continue;
      const std::uint8_t* grad = &grads[term.source][term.token * row_bytes];
      std::uint8_t* row = &gradients[r].rows[term.slot * row_bytes];
      const std::optional<Real> w = summation.weight(term);
      for (std::int64_t h = 0; h < spec.hidden_size; ++h) {
        const Real g = static_cast<Real>(read(spec.dtype, grad, h));
        write(spec.dtype, row, h, w ? *w * g : g);
      }
      if (w)
        gradients[term.source].weights[term.token * top_k + term.k] +=
            dot(grad, &inputs[r].y[term.slot * row_bytes], spec.dtype, spec.hidden_size);
    }
  }
  return gradients;
}

}  // namespace

std::vector<int> local_experts(const Placement& placement, int rank) {
  std::vector<int> experts;
  for (int e = 0; e < static_cast<int>(placement.experts.size()); ++e) {
    for (const Copy& copy : placement.experts[e]) {
      if (std::find(copy.shard_ranks.begin(), copy.shard_ranks.end(), rank) != copy.shard_ranks.end()) experts.push_back(e);
    }
  }
  return experts;
}

std::vector<Output> dispatch(const Placement& placement, const std::vector<Input>& inputs, const DispatchSpec& spec) {
  std::vector<Output> outputs(placement.ranks);
  for (Output& out : outputs) out.sent_counts.assign(placement.ranks, 0);
  for (int rank = 0; rank < placement.ranks; ++rank) {
    Output& out = outputs[rank];
    out.terms = terms_of(rank, placement, inputs, spec);
    const std::size_t locals = local_experts(placement, rank).size();
    out.expert_counts.assign(locals, 0);
    out.dropped.assign(locals, 0);
    out.rank_counts.assign(placement.ranks, 0);
    std::set<TokenKey> tokens;
    for (const Term& term : out.terms) {
      ++out.expert_counts[term.local];
      if (!tokens.insert({term.source, term.token}).second) continue;
      ++out.rank_counts[term.source];
      ++outputs[term.source].sent_counts[rank];
    }
    out.token_rows = static_cast<std::int64_t>(tokens.size());
    out.overflow = out.token_rows > spec.receive_rows;
    if (expert_layout(spec.layout))
      lay_out_experts(out, inputs, spec);
    else
      lay_out_tokens(out, inputs, spec);
  }
  return outputs;
}

std::vector<CombineOutput> combine(const Dispatched& dispatched, const std::vector<CombineInput>& inputs, const CombineSpec& spec) {
  return spec.dtype == Dtype::float64 ? combine_in<double>(dispatched, inputs, spec) : combine_in<float>(dispatched, inputs, spec);
}

std::vector<CombineGradient> combine_backward(const Dispatched& dispatched, const std::vector<Bytes>& grads,
                                              const std::vector<CombineInput>& inputs, const CombineSpec& spec) {
  return spec.dtype == Dtype::float64 ? backward_in<double>(dispatched, grads, inputs, spec)
                                      : backward_in<float>(dispatched, grads, inputs, spec);
}

}  // namespace tokenyard::naive
