#include "check.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tokenyard::cli {
namespace {

const std::byte* row_at(const ConstTensorView& rows, std::int64_t slot) {
  if (rows.ndim == 2) return rows.row(slot);
  return rows.row(slot / rows.shape[1]) + slot % rows.shape[1] * rows.strides[1] * size_of(rows.dtype);
}

std::string hex(const std::byte* bytes, std::int64_t count) {
  std::string text;
  for (std::int64_t i = 0; i < count; ++i) text += fmt::format("{:02x}", static_cast<unsigned>(bytes[i]));
  return text;
}

template <class T>
std::optional<Difference> compare(const char* what, const ConstTensorView& seen, std::int64_t at, T expected) {
  if (!seen) return Difference{what, 0, at, fmt::format("{}", expected), "no such tensor"};
  const T value = seen.as<T>()[at];
  if (value == expected) return std::nullopt;
  return Difference{what, 0, at, fmt::format("{}", expected), fmt::format("{}", value)};
}

// The bytes around the first that differs, a few elements of them.
std::optional<Difference> compare_bytes(const char* what, const std::byte* seen, const std::vector<std::byte>& expected,
                                        std::int64_t slot) {
  if (std::memcmp(seen, expected.data(), expected.size()) == 0) return std::nullopt;
  const auto first = std::mismatch(expected.begin(), expected.end(), seen).first - expected.begin();
  const std::int64_t begin = first / 8 * 8;
  const std::int64_t count = std::min<std::int64_t>(16, std::ssize(expected) - begin);
  return Difference{what, 0, slot, fmt::format("{} from byte {}", hex(expected.data() + begin, count), begin),
                    fmt::format("{} from byte {}", hex(seen + begin, count), begin)};
}

}  // namespace

std::string Difference::message() const {
  return fmt::format("{} of rank {}, slot {}: expected {}, seen {}", what, rank, slot, expected, seen);
}

double expert_scale(int rank) { return std::ldexp(1.0, -(rank % 3)); }

std::vector<std::byte> expert_output(const Workload& workload, const Received& received, int rank) {
  const ConstTensorView rows = received.rows();
  const Dtype dtype = workload.expert_dtype();
  const std::int64_t count = workload.hidden_size == 0 ? 0 : rows.num_elements() / workload.hidden_size;
  const std::int64_t out_bytes = workload.hidden_size * size_of(dtype);
  std::vector<std::byte> y(static_cast<std::size_t>(count * out_bytes));
  std::vector<float> values(static_cast<std::size_t>(workload.hidden_size));
  for (std::int64_t slot = 0; slot < count; ++slot) {
    decode(rows.dtype, row_at(rows, slot), values);
    for (float& value : values) value *= static_cast<float>(expert_scale(rank));
    encode(dtype, values, y.data() + slot * out_bytes);
  }
  return y;
}

Checker::Checker(const Workload& workload, const Placement& placement, int rank) : workload_(workload), placement_(placement), rank_(rank) {
  const std::span<const int> local = placement.local_experts(rank);
  for (int source = 0; source < workload.ranks(); ++source) {
    routing_.push_back(draw_routing(workload, source));
    const Routing& routing = routing_.back();
    for (std::int64_t at = 0; at < std::ssize(routing.topk_ids); ++at) {
      const auto expert = static_cast<int>(routing.topk_ids[at]);
      if (expert < 0) continue;
      const std::int64_t token = at / workload.top_k();
      const Replica& replica = placement.replicas(expert)[placement.replica_for(expert, source, token)];
      if (std::count(replica.shard_ranks.begin(), replica.shard_ranks.end(), rank) == 0) continue;
      const auto place = std::lower_bound(local.begin(), local.end(), expert) - local.begin();
      arrivals_.push_back({source, token, static_cast<int>(at % workload.top_k()), static_cast<int>(place), routing.topk_weights[at]});
    }
  }
}

std::optional<Difference> Checker::dispatched(const Received& received) const {
  std::optional<Difference> found;
  switch (received.handle().layout()) {
    case Layout::token_major:
      found = token_rows(received);
      break;
    case Layout::expert_major:
    case Layout::expert_padded:
      found = expert_rows(received);
      break;
    case Layout::rank_slots:
      found = slot_rows(received);
      break;
  }
  if (found) found->rank = rank_;
  return found;
}

// Arrivals of one (source rank, token) each.
std::vector<std::vector<Arrival>> Checker::tokens_here() const {
  std::vector<std::vector<Arrival>> tokens;
  for (const Arrival& arrival : arrivals_) {
    const bool same =
        !tokens.empty() && tokens.back().front().source_rank == arrival.source_rank && tokens.back().front().token == arrival.token;
    if (!same) tokens.emplace_back();
    tokens.back().push_back(arrival);
  }
  return tokens;
}

std::optional<Difference> Checker::compare_row(const Received& received, std::int64_t slot, const Arrival& arrival) const {
  std::vector<std::byte> expected(static_cast<std::size_t>(workload_.row_bytes()));
  fill_row(workload_, arrival.source_rank, arrival.token, expected.data());
  if (auto found = compare_bytes("row", row_at(received.rows(), slot), expected, slot)) return found;
  if (workload_.scale_columns() == 0) return std::nullopt;
  std::vector<std::byte> scales(static_cast<std::size_t>(workload_.scale_columns()) * sizeof(float));
  fill_scales(workload_, arrival.source_rank, arrival.token, reinterpret_cast<float*>(scales.data()));
  return compare_bytes("scales", row_at(received.scales(), slot), scales, slot);
}

std::optional<Difference> Checker::token_rows(const Received& received) const {
  const std::vector<std::vector<Arrival>> tokens = tokens_here();
  if (received.num_rows() != std::ssize(tokens)) {
    return Difference{"number of rows", rank_, 0, std::to_string(tokens.size()), std::to_string(received.num_rows())};
  }
  const int top_k = workload_.top_k();
  for (std::int64_t slot = 0; slot < std::ssize(tokens); ++slot) {
    const Arrival& first = tokens[slot].front();
    if (auto found = compare<std::int32_t>("source_rank", received.source_rank(), slot, first.source_rank)) return found;
    if (auto found = compare<std::int32_t>("source_token", received.source_token(), slot, static_cast<int>(first.token))) return found;
    std::vector<int> local(static_cast<std::size_t>(top_k), -1);
    for (const Arrival& arrival : tokens[slot]) local[arrival.k] = arrival.local;
    for (int k = 0; k < top_k; ++k) {
      const float weight = routing_[first.source_rank].topk_weights[first.token * top_k + k];
      if (auto found = compare<std::int32_t>("local_ids", received.local_ids(), slot * top_k + k, local[k])) return found;
      if (auto found = compare<float>("row_weights", received.row_weights(), slot * top_k + k, weight)) return found;
    }
    if (auto found = compare_row(received, slot, first)) return found;
  }
  return received.expert_rows() ? gather_map(received) : std::nullopt;
}

std::optional<Difference> Checker::gather_map(const Received& received) const {
  const std::vector<std::vector<Arrival>> tokens = tokens_here();
  std::vector<std::vector<std::int32_t>> rows(placement_.local_experts(rank_).size());
  for (std::int64_t slot = 0; slot < std::ssize(tokens); ++slot) {
    for (const Arrival& arrival : tokens[slot]) rows[arrival.local].push_back(static_cast<std::int32_t>(slot));
  }
  std::int32_t at = 0;
  for (std::int64_t local = 0; local < std::ssize(rows); ++local) {
    if (auto found = compare<std::int32_t>("expert_offsets", received.expert_offsets(), local, at)) return found;
    for (const std::int32_t row : rows[local]) {
      if (auto found = compare<std::int32_t>("expert_rows", received.expert_rows(), at++, row)) return found;
    }
  }
  return compare<std::int32_t>("expert_offsets", received.expert_offsets(), std::ssize(rows), at);
}

std::optional<Difference> Checker::expert_rows(const Received& received) const {
  const bool padded = received.handle().layout() == Layout::expert_padded;
  std::vector<Arrival> ordered = arrivals_;
  std::stable_sort(ordered.begin(), ordered.end(), [](const Arrival& a, const Arrival& b) { return a.local < b.local; });
  const auto experts = std::ssize(placement_.local_experts(rank_));
  auto next = ordered.begin();
  for (std::int64_t local = 0; local < experts; ++local) {
    const auto end = std::find_if(next, ordered.end(), [&](const Arrival& a) { return a.local != local; });
    if (auto found = compare<std::int32_t>("expert_counts", received.expert_counts(), local, static_cast<int>(end - next))) return found;
    std::int64_t slot = padded ? local * received.rows().shape[1] : received.expert_offsets().as<std::int32_t>()[local];
    for (; next != end; ++next, ++slot) {
      if (auto found = compare<std::int32_t>("source_rank", received.source_rank(), slot, next->source_rank)) return found;
      if (auto found = compare<std::int32_t>("source_token", received.source_token(), slot, static_cast<int>(next->token))) return found;
      if (auto found = compare<std::int32_t>("source_k", received.source_k(), slot, next->k)) return found;
      if (auto found = compare<float>("row_weights", received.row_weights(), slot, next->weight)) return found;
      if (auto found = compare_row(received, slot, *next)) return found;
    }
  }
  return std::nullopt;
}

std::optional<Difference> Checker::slot_rows(const Received& received) const {
  const std::int64_t slots = received.rows().shape[0] * received.rows().shape[1];
  std::vector<std::uint8_t> present(static_cast<std::size_t>(slots), 0);
  for (const std::vector<Arrival>& token : tokens_here()) {
    const std::int64_t slot = token.front().source_rank * received.rows().shape[1] + token.front().token;
    present[slot] = 1;
    if (auto found = compare_row(received, slot, token.front())) return found;
    for (const Arrival& arrival : token) {
      const std::int64_t at = slot * workload_.top_k() + arrival.k;
      if (auto found = compare<std::int32_t>("local_ids", received.local_ids(), at, arrival.local)) return found;
      if (auto found = compare<float>("row_weights", received.row_weights(), at, arrival.weight)) return found;
    }
  }
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    if (auto found = compare<std::uint8_t>("present", received.present(), slot, present[slot])) return found;
  }
  return std::nullopt;
}

// What each destination rank contributes to the sum of one token, as a multiple of the token's row.
std::vector<double> Checker::coefficients(std::int64_t token, bool folded_by_caller, bool weighted) const {
  const Routing& routing = routing_[rank_];
  std::vector<double> terms(static_cast<std::size_t>(workload_.ranks()), 0);
  for (int k = 0; k < workload_.top_k(); ++k) {
    const std::int64_t at = token * workload_.top_k() + k;
    const auto expert = static_cast<int>(routing.topk_ids[at]);
    if (expert < 0) continue;
    for (const int rank : placement_.replicas(expert)[placement_.replica_for(expert, rank_, token)].shard_ranks) {
      const double term = expert_scale(rank) * (weighted ? routing.topk_weights[at] : 1.0);
      terms[rank] = folded_by_caller ? term : terms[rank] + term;
    }
  }
  std::erase(terms, 0.0);
  return terms;
}

std::optional<Difference> Checker::combined(const ConstTensorView& out, Layout layout, Weighting weighting) const {
  const bool folded_by_caller = layout == Layout::token_major || layout == Layout::rank_slots;
  const bool weighted = weighting == Weighting::at_expert || weighting == Weighting::at_source;
  const Dtype dtype = workload_.expert_dtype();
  std::vector<std::byte> bytes(static_cast<std::size_t>(workload_.row_bytes()));
  std::vector<float> row(static_cast<std::size_t>(workload_.hidden_size));
  std::vector<float> sums(row.size());
  for (std::int64_t token = 0; token < workload_.tokens[rank_]; ++token) {
    const std::vector<double> terms = coefficients(token, folded_by_caller, weighted);
    fill_row(workload_, rank_, token, bytes.data());
    decode(workload_.dtype, bytes.data(), row);
    decode(out.dtype, out.row(token), sums);
    for (std::int64_t h = 0; h < workload_.hidden_size; ++h) {
      double expected = 0;
      double magnitude = 0;
      for (const double term : terms) {
        expected += weighted ? term * row[h] : rounded(dtype, term * row[h]);
        magnitude += std::abs(term * row[h]);
      }
      const double allowed = weighted ? tolerance(dtype) * magnitude : 0;
      if (!weighted) expected = rounded(out.dtype, expected);
      if (std::abs(sums[h] - expected) <= allowed) continue;
      return Difference{"sum", rank_, token, fmt::format("{} at element {}", expected, h), fmt::format("{}", sums[h])};
    }
  }
  return std::nullopt;
}

// A partial sum and the final sum are rounded once each; the unit roundoff of the dtype, with room for float32 sums of 64 terms.
double Checker::tolerance(Dtype dtype) {
  switch (dtype) {
    case Dtype::bfloat16:
      return 0x1p-7;
    case Dtype::float16:
      return 0x1p-10;
    default:
      return 0x1p-17;
  }
}

}  // namespace tokenyard::cli
