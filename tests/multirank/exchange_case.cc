#include "multirank/exchange_case.h"

#include <fmt/core.h>

#include <algorithm>
#include <random>
#include <set>
#include <string_view>
#include <tuple>

#include "tokenyard/options.h"

namespace tokenyard::exchange_test {
namespace {

struct Value {
  std::int64_t number;
  std::string label;
};
struct FactorValues {
  std::string_view name;
  std::vector<Value> values;
};

std::vector<Value> labels(std::initializer_list<const char*> names) {
  std::vector<Value> values;
  for (const char* text : names) values.push_back({static_cast<std::int64_t>(values.size()), text});
  return values;
}

std::vector<Value> numbers(std::initializer_list<std::int64_t> list) {
  std::vector<Value> values;
  for (std::int64_t number : list) values.push_back({number, std::to_string(number)});
  return values;
}

// In the order of Factor.
const std::vector<FactorValues>& factors() {
  static const std::vector<FactorValues> list = {
      {"layout", labels({"token_major", "expert_major", "expert_padded", "rank_slots"})},
      {"mode", labels({"throughput", "latency"})},
      {"sizing", labels({"exact", "capacity"})},
      {"dtype", labels({"float64", "float32", "bfloat16", "float16"})},
      {"order", labels({"rank_ascending", "topk"})},
      {"groups", labels({"none", "one", "halves", "each"})},
      {"memory", labels({"inproc", "shm"})},
      {"threads", numbers({1, 3})},
      {"weighting", labels({"none", "at_input", "at_expert", "at_source"})},
      {"fold", numbers({0, 1})},
      {"cached", numbers({0, 1})},
      {"copy_out", labels({"lease", "own", "caller"})},
      {"quantise", labels({"none", "float32", "float32_pow2", "ue8m0"})},
      {"scales", labels({"none", "dense", "strided"})},
      {"validate", numbers({0, 1})},
      {"depth", numbers({1, 2, 3})},
      {"ranks", numbers({1, 2, 3, 4, 5, 8})},
      {"experts", numbers({1, 7, 64, 257, 2048})},
      {"top_k", numbers({1, 2, 6, 8, 9, 22, 64})},
      {"row_bytes", numbers({16, 144, 4096, 5760, 7168, 14336, 32768})},
      {"tokens", labels({"all_full", "uneven", "one_empty", "several_empty", "all_empty"})},
      {"ids", labels({"random", "skewed", "all_negative", "one_expert", "duplicates", "some_out_of_range"})},
      {"placement", labels({"uniform", "tensor_parallel", "replicas", "sharded_replicas", "empty_ranks"})},
      {"strided", numbers({0, 1})},
      {"receive_rows", labels({"bound", "tight"})},
      {"expert_capacity", labels({"none", "tight", "drop"})},
      {"alignment", numbers({1, 16, 256})},
      {"zero_padding", numbers({0, 1})},
      {"gather_map", numbers({0, 1})},
      {"topk_weights", numbers({0, 1})},
      {"ids_dtype", labels({"int64", "int32", "one_dimension"})},
      {"bias", numbers({0, 1, 2})},
      {"out", labels({"own", "caller", "caller_float32"})},
      {"row_weights", numbers({0, 1})},
      {"token_base", numbers({0, 4'000'000'000})},
      {"phases", labels({"whole", "halves"})},
      {"expert_rows", numbers({0, 1})},
  };
  return list;
}

std::int64_t element_bytes(const Case& c) {
  const auto dtype = c.as<Dtype>(kDtype);
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Elements that the reference adds up for one token on every rank; what a case costs.
std::int64_t cost_per_token(const Case& c) {
  const std::int64_t copies = c.as<Placed>(kPlacement) == Placed::tensor_parallel ? 2 : 1;
  return c.number(kRanks) * std::max<std::int64_t>(1, c.number(kTopK) * copies) * (c.number(kRowBytes) / element_bytes(c) + 8);
}

constexpr std::int64_t kMaxCost = 200'000;

// Of an expert layout on the fullest rank, at its bound.
std::int64_t layout_bytes(const Case& c) {
  const std::int64_t local_experts = c.number(kExperts) / std::max<std::int64_t>(1, c.number(kRanks) / 2) + 1;
  const std::int64_t rows = c.number(kRanks) * c.max_tokens();
  const bool padded = c.as<Layout>(kLayout) == Layout::expert_padded;
  return (padded ? local_experts * rows : rows * c.number(kTopK) + local_experts * c.number(kAlignment)) * c.number(kRowBytes);
}

bool layout_is_legal(const Case& c) {
  const auto layout = c.as<Layout>(kLayout);
  const auto mode = c.as<Mode>(kMode);
  const bool expert = layout == Layout::expert_major || layout == Layout::expert_padded;
  if (layout == Layout::rank_slots && mode != Mode::latency) return false;
  if (mode == Mode::latency && c.as<Sizing>(kSizing) != Sizing::capacity) return false;
  if (mode == Mode::latency && c.as<ReceiveRows>(kReceiveRows) != ReceiveRows::bound) return false;
  if (!expert && c.as<Weighting>(kWeighting) >= Weighting::at_expert) return false;
  if (!expert && (!c.is(kFold) || c.is(kZeroPadding) || c.as<ExpertCapacity>(kExpertCapacity) != ExpertCapacity::none)) return false;
  if (!c.is(kFold) && c.as<Groups>(kGroups) >= Groups::halves) return false;
  if (c.number(kAlignment) > 1 && layout != Layout::expert_major) return false;
  if (c.is(kGatherMap) && layout != Layout::token_major) return false;
  if (c.is(kExpertRows) && expert) return false;
  return !expert || layout_bytes(c) <= 4'000'000;
}

bool input_is_legal(const Case& c) {
  const auto placed = c.as<Placed>(kPlacement);
  const std::int64_t ranks = c.number(kRanks);
  if (placed == Placed::tensor_parallel && ranks % 2 != 0) return false;
  if (placed != Placed::uniform && ranks == 1) return false;
  if (placed == Placed::sharded_replicas && ranks < 4) return false;
  if (c.as<Groups>(kGroups) >= Groups::halves && ranks < 2) return false;
  if (c.as<Tokens>(kTokens) == Tokens::several_empty && ranks < 3) return false;
  if (c.as<Tokens>(kTokens) == Tokens::one_empty && ranks < 2) return false;
  if (c.as<Ids>(kIds) == Ids::some_out_of_range && c.is(kValidate)) return false;
  if (c.as<Ids>(kIds) == Ids::duplicates && c.number(kTopK) < 2) return false;
  if (c.as<IdsDtype>(kIdsDtype) == IdsDtype::one_dimension && c.number(kTopK) != 1) return false;
  if (c.as<Quantising>(kQuantise) != Quantising::none) {
    if (c.as<Scales>(kScales) != Scales::none || c.as<Dtype>(kDtype) == Dtype::float64) return false;
    if (c.number(kRowBytes) / element_bytes(c) % 16 != 0) return false;
  }
  if (c.device == Device::cuda && c.as<Dtype>(kDtype) == Dtype::float64) return false;
  return cost_per_token(c) <= kMaxCost;
}

bool legal(const Case& c) { return layout_is_legal(c) && input_is_legal(c); }

using Random = std::mt19937_64;

std::int64_t pick(int factor, Random& random) {
  const std::vector<Value>& values = factors()[factor].values;
  return values[random() % values.size()].number;
}

// A random legal case with `fixed` factors as they are in `c`: illegal ones are repaired one factor at a time. False when none was found.
bool fill(Case& c, const std::set<int>& fixed, Random& random) {
  for (int f = 0; f < kNumFactors; ++f) {
    if (!fixed.contains(f)) c.values[f] = pick(f, random);
  }
  for (int step = 0; step < 2000; ++step) {
    if (legal(c)) return true;
    const int f = static_cast<int>(random() % kNumFactors);
    if (!fixed.contains(f)) c.values[f] = pick(f, random);
  }
  return false;
}

using Pair = std::tuple<int, std::int64_t, int, std::int64_t>;

std::set<Pair> all_pairs() {
  std::set<Pair> pairs;
  for (int f = 0; f < kNumFactors; ++f) {
    for (int g = f + 1; g < kNumFactors; ++g) {
      for (const Value& a : factors()[f].values) {
        for (const Value& b : factors()[g].values) pairs.insert({f, a.number, g, b.number});
      }
    }
  }
  return pairs;
}

std::vector<Pair> pairs_of(const Case& c) {
  std::vector<Pair> pairs;
  for (int f = 0; f < kNumFactors; ++f) {
    for (int g = f + 1; g < kNumFactors; ++g) pairs.emplace_back(f, c.values[f], g, c.values[g]);
  }
  return pairs;
}

}  // namespace

std::int64_t Case::max_tokens() const { return std::clamp<std::int64_t>(kMaxCost / cost_per_token(*this), 1, 9); }

std::string describe(const Case& c) {
  std::string text = fmt::format("device={} seed={}", name(c.device), c.seed);
  for (int f = 0; f < kNumFactors; ++f) {
    for (const Value& value : factors()[f].values) {
      if (value.number == c.values[f]) text += fmt::format(" {}={}", factors()[f].name, value.label);
    }
  }
  return text;
}

std::vector<Case> pairwise_cases(std::uint64_t seed, Device device) {
  Random random(seed);
  std::set<Pair> open = all_pairs();
  std::vector<Case> cases;
  while (!open.empty()) {
    const auto [f, a, g, b] = *open.begin();
    Case best;
    std::size_t most = 0;
    for (int attempt = 0; attempt < 12; ++attempt) {
      Case c{.seed = seed + cases.size(), .values = {}, .device = device};
      c.values[f] = a;
      c.values[g] = b;
      if (!fill(c, {f, g}, random)) continue;
      const std::vector<Pair> pairs = pairs_of(c);
      const auto fresh =
          static_cast<std::size_t>(std::count_if(pairs.begin(), pairs.end(), [&](const Pair& p) { return open.contains(p); }));
      if (fresh > most) {
        most = fresh;
        best = c;
      }
    }
    open.erase({f, a, g, b});  // a pair that no legal case has ends here too
    if (most == 0) continue;
    for (const Pair& pair : pairs_of(best)) open.erase(pair);
    cases.push_back(best);
  }
  return cases;
}

Case random_case(std::uint64_t seed, Device device) {
  Random random(seed);
  Case c{.seed = seed, .values = {}, .device = device};
  while (!fill(c, {}, random)) {
  }
  return c;
}

}  // namespace tokenyard::exchange_test
