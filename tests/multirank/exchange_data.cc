#include "multirank/exchange_data.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>

namespace tokenyard::exchange_test {
namespace {

using Random = std::mt19937_64;

constexpr int kRounds = 2;
constexpr std::int64_t kGivenScaleBytes = 12;
constexpr int kPoolBits = 12;
constexpr std::uint64_t kPoolValues = 1 << kPoolBits;

// Independent streams of one seed.
Random stream(std::uint64_t seed, std::initializer_list<std::uint64_t> path) {
  std::vector<std::uint32_t> words = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (std::uint64_t step : path) words.push_back(static_cast<std::uint32_t>(step));
  std::seed_seq sequence(words.begin(), words.end());
  return Random(sequence);
}

std::int64_t below(Random& random, std::int64_t bound) { return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(bound)); }

std::vector<std::vector<Replica>> replicas_of(const Case& c) {
  Random random = stream(c.seed, {1});
  const auto ranks = static_cast<int>(c.number(kRanks));
  const bool sharded = c.as<Placed>(kPlacement) == Placed::sharded_replicas;
  std::vector<std::vector<Replica>> experts(c.number(kExperts));
  std::vector<int> order(ranks);
  std::iota(order.begin(), order.end(), 0);
  for (auto& replicas : experts) {
    std::shuffle(order.begin(), order.end(), random);
    const std::int64_t copies = 1 + below(random, std::min(3, sharded ? ranks / 2 : ranks));
    std::size_t next = 0;
    for (std::int64_t i = 0; i < copies; ++i) {
      Replica replica{.shard_ranks = {order[next++]}, .share = static_cast<std::uint32_t>(1 + below(random, 5))};
      if (sharded && below(random, 2) == 0) replica.shard_ranks.push_back(order[next++]);
      replicas.push_back(replica);
    }
  }
  return experts;
}

// All experts on the odd ranks.
std::vector<std::vector<Replica>> odd_ranks_only(const Case& c) {
  std::vector<std::vector<Replica>> experts;
  const int holders = static_cast<int>(c.number(kRanks)) / 2;
  for (int e = 0; e < c.number(kExperts); ++e) experts.push_back({{.shard_ranks = {1 + 2 * (e % holders)}}});
  return experts;
}

// What the builders document, worked out again.
naive::Placement naive_placement(const Case& c) {
  const auto ranks = static_cast<int>(c.number(kRanks));
  const auto experts = static_cast<int>(c.number(kExperts));
  naive::Placement placement{.ranks = ranks};
  const auto placed = c.as<Placed>(kPlacement);
  if (placed == Placed::uniform || placed == Placed::tensor_parallel) {
    const int tp = placed == Placed::uniform ? 1 : 2;
    const int windows = ranks / tp;
    for (int window = 0; window < windows; ++window) {
      const int owned = experts / windows + (window < experts % windows ? 1 : 0);
      naive::Copy copy;
      for (int shard = 0; shard < tp; ++shard) copy.shard_ranks.push_back(window * tp + shard);
      placement.experts.insert(placement.experts.end(), owned, {copy});
    }
    return placement;
  }
  for (const auto& replicas : placed == Placed::empty_ranks ? odd_ranks_only(c) : replicas_of(c)) {
    std::vector<naive::Copy> copies;
    for (const Replica& replica : replicas) copies.push_back({replica.shard_ranks, replica.share});
    placement.experts.push_back(copies);
  }
  return placement;
}

std::int64_t tokens_of(const Case& c, int rank, Random& random) {
  const std::int64_t most = c.max_tokens();
  switch (c.as<Tokens>(kTokens)) {
    case Tokens::all_full:
      return most;
    case Tokens::uneven:
      return below(random, most + 1);
    case Tokens::one_empty:
      return rank == static_cast<int>(c.seed % c.number(kRanks)) ? 0 : most;
    case Tokens::several_empty:
      return rank % 2 == static_cast<int>(c.seed % 2) ? 0 : most;
    case Tokens::all_empty:
      return 0;
  }
  return most;
}

// K ids of one token.
void add_ids(const Case& c, Random& random, std::vector<std::int64_t>& ids) {
  const std::int64_t experts = c.number(kExperts);
  const std::int64_t top_k = c.number(kTopK);
  const auto pattern = c.as<Ids>(kIds);
  std::vector<std::int64_t> chosen;
  while (static_cast<std::int64_t>(chosen.size()) < top_k) {
    const std::int64_t position = static_cast<std::int64_t>(chosen.size());
    std::int64_t id = below(random, experts);
    if (pattern == Ids::skewed) id = id * id / experts * id / experts;
    if (pattern == Ids::all_negative) id = -1 - below(random, 1000);
    if (pattern == Ids::one_expert) id = position == 0 ? static_cast<std::int64_t>(c.seed % experts) : -1;
    if (pattern == Ids::duplicates) id = below(random, std::min<std::int64_t>(experts, 2));
    if (pattern == Ids::some_out_of_range && below(random, 3) == 0) id = experts + below(random, 100'000);
    if (below(random, 8) == 0 && pattern != Ids::one_expert) id = -1;
    const bool repeated = std::find(chosen.begin(), chosen.end(), id) != chosen.end();
    if (repeated && pattern != Ids::duplicates) id = -1;
    chosen.push_back(id);
  }
  ids.insert(ids.end(), chosen.begin(), chosen.end());
}

// Values to choose from: drawing each anew would be most of what the tests do.
Bytes value_pool(Dtype dtype, bool with_specials) {
  Random random(static_cast<std::uint64_t>(dtype));
  std::normal_distribution<double> normal;
  const std::vector<double> specials = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-40, -3e-8, 6e4, -3e38};
  Bytes pool(kPoolValues * naive::bytes_of(dtype));
  for (std::uint64_t i = 0; i < kPoolValues; ++i) {
    const bool special = with_specials && i % 64 == 0;
    naive::write(dtype, pool.data(), static_cast<std::int64_t>(i), special ? specials[i / 64 % specials.size()] : normal(random));
  }
  return pool;
}

std::vector<float> random_weights(std::uint64_t seed, std::int64_t count) {
  Random random(seed);
  std::uniform_real_distribution<float> uniform(-1.0F, 2.0F);
  std::vector<float> weights(count);
  for (float& weight : weights) weight = uniform(random);
  return weights;
}

Bytes nonzero_bytes(std::uint64_t seed, std::int64_t count) {
  Random random(seed);
  Bytes bytes(count);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(1 + random() % 255);
  return bytes;
}

Bytes random_rows(const CaseData& data, std::uint64_t seed, std::int64_t tokens) {
  const std::int64_t count = tokens * data.given_row_bytes;
  if (data.config.as<Quantising>(kQuantise) == Quantising::none) return nonzero_bytes(seed, count);
  const auto dtype = data.config.as<Dtype>(kDtype);
  return random_values(seed, count / naive::bytes_of(dtype), dtype, false);
}

std::vector<naive::Input> make_inputs(const CaseData& data, int round) {
  const Case& c = data.config;
  std::vector<naive::Input> inputs;
  for (int rank = 0; rank < static_cast<int>(c.number(kRanks)); ++rank) {
    Random random = stream(c.seed, {2, static_cast<std::uint64_t>(round), static_cast<std::uint64_t>(rank)});
    naive::Input input{.tokens = tokens_of(c, rank, random)};
    for (std::int64_t t = 0; t < input.tokens; ++t) add_ids(c, random, input.ids);
    input.rows = random_rows(data, random(), input.tokens);
    if (c.as<Scales>(kScales) != Scales::none) input.scales = nonzero_bytes(random(), input.tokens * kGivenScaleBytes);
    if (c.is(kTopkWeights)) input.weights = random_weights(random(), input.tokens * c.number(kTopK));
    inputs.push_back(std::move(input));
  }
  return inputs;
}

std::optional<ScaleFormat> scale_format(const Case& c) {
  const auto quantising = c.as<Quantising>(kQuantise);
  if (quantising == Quantising::none) return std::nullopt;
  return static_cast<ScaleFormat>(static_cast<int>(quantising) - 1);
}

// What crosses the links: the rows as given, or quantised.
std::vector<naive::Input> as_sent(const CaseData& data, std::vector<naive::Input> inputs) {
  const std::optional<ScaleFormat> format = scale_format(data.config);
  if (!format) return inputs;
  const auto dtype = data.config.as<Dtype>(kDtype);
  for (naive::Input& input : inputs) {
    Bytes rows;
    for (std::int64_t t = 0; t < input.tokens; ++t) {
      const std::uint8_t* row = &input.rows[t * data.given_row_bytes];
      const naive::Quantised q = naive::quantise_row(row, dtype, data.given_row_bytes / naive::bytes_of(dtype), *format);
      rows.insert(rows.end(), q.q.begin(), q.q.end());
      input.scales.insert(input.scales.end(), q.scales.begin(), q.scales.end());
    }
    input.rows = rows;
  }
  return inputs;
}

std::vector<naive::Output> expect(const CaseData& data, const std::vector<naive::Input>& given) {
  return naive::dispatch(data.placement, as_sent(data, given), data.dispatch);
}

// Rows for every slot of a rank; those that nobody may read are NaN of every type.
Bytes slot_values(const naive::Output& received, std::uint64_t seed, std::int64_t hidden_size, Dtype dtype) {
  Bytes values = random_values(seed, received.slots * hidden_size, dtype, true);
  const std::int64_t row_bytes = hidden_size * naive::bytes_of(dtype);
  for (std::int64_t slot = 0; slot < received.slots; ++slot) {
    if (received.used[slot] == 0) std::memset(&values[slot * row_bytes], 0xff, row_bytes);
  }
  return values;
}

void add_combine(CaseData& data, Round& round, std::uint64_t seed) {
  const Case& c = data.config;
  const auto dtype = c.as<Dtype>(kDtype);
  const std::int64_t hidden_size = data.combine.hidden_size;
  for (std::size_t rank = 0; rank < round.received.size(); ++rank) {
    Random random = stream(seed, {3, rank});
    const naive::Output& received = round.received[rank];
    const std::int64_t tokens = round.given[rank].tokens;
    naive::CombineInput input;
    input.y = slot_values(received, random(), hidden_size, dtype);
    input.row_weights = random_weights(random(), static_cast<std::int64_t>(received.row_weights.size()));
    input.source_weights = random_weights(random(), tokens * c.number(kTopK));
    if (c.number(kBias) >= 1) input.bias0 = random_values(random(), tokens * hidden_size, dtype, true);
    if (c.number(kBias) >= 2) input.bias1 = random_values(random(), tokens * hidden_size, dtype, true);
    round.to_combine.push_back(input);
    naive::CombineInput grads;
    grads.y = slot_values(received, random(), hidden_size, dtype);
    grads.row_weights = random_weights(random(), static_cast<std::int64_t>(received.row_weights.size()));
    round.row_grads.push_back(grads);
    round.out_grads.push_back(random_values(random(), tokens * hidden_size, dtype, true));
  }
  const naive::Dispatched dispatched{data.dispatch, round.given, round.received};
  round.combined = naive::combine(dispatched, round.to_combine, data.combine);
  round.dispatch_grads = naive::combine(dispatched, round.row_grads, data.backward);
  round.combine_grads = naive::combine_backward(dispatched, round.out_grads, round.to_combine, data.combine);
}

Round make_round(CaseData& data, int index) {
  const Case& c = data.config;
  Round round;
  round.given = make_inputs(data, index);
  round.received = expect(data, round.given);
  if (c.is(kCached)) {
    round.given_again = round.given;
    for (naive::Input& input : round.given_again) {
      const std::uint64_t seed = stream(c.seed, {4, static_cast<std::uint64_t>(index), static_cast<std::uint64_t>(input.tokens)})();
      input.rows = random_rows(data, seed, input.tokens);
      if (!input.scales.empty()) input.scales = nonzero_bytes(seed + 1, static_cast<std::int64_t>(input.scales.size()));
    }
    round.received_again = expect(data, round.given_again);
  }
  add_combine(data, round, c.seed * 31 + static_cast<std::uint64_t>(index));
  return round;
}

// Capacities that the rounds of a case just meet, or that make it drop.
void set_capacities(CaseData& data) {
  const Case& c = data.config;
  const auto ranks = c.number(kRanks);
  std::int64_t most_rows = 1;
  std::int64_t most_slots = 1;
  std::int64_t most_of_an_expert = 1;
  for (int index = 0; index < kRounds; ++index) {
    for (const naive::Output& out : expect(data, make_inputs(data, index))) {
      std::vector<std::int64_t> counts(out.expert_counts.size(), 0);
      for (const naive::Term& term : out.terms) most_of_an_expert = std::max(most_of_an_expert, ++counts[term.local]);
      most_rows = std::max(most_rows, out.token_rows);
      most_slots = std::max(most_slots, out.slots);
    }
  }
  const bool tight = c.as<ReceiveRows>(kReceiveRows) == ReceiveRows::tight;
  data.options.receive_rows = tight ? most_rows : 0;
  if (tight && data.dispatch.layout == Layout::expert_major) data.options.max_expert_rows = most_slots;
  data.dispatch.receive_rows = data.options.receive_rows == 0 ? ranks * data.max_tokens : most_rows;
  switch (c.as<ExpertCapacity>(kExpertCapacity)) {
    case ExpertCapacity::tight:
      data.dispatch.expert_capacity = most_of_an_expert;
      break;
    case ExpertCapacity::drop:
      data.dispatch.expert_capacity = (most_of_an_expert + 1) / 2;
      break;
    case ExpertCapacity::none:  // an expert that a token names twice can have more rows than a rank receives
      if (data.dispatch.layout == Layout::expert_padded && most_of_an_expert > data.dispatch.receive_rows) {
        data.dispatch.expert_capacity = most_of_an_expert;
      }
      break;
  }
  data.dispatch.drop = c.as<ExpertCapacity>(kExpertCapacity) == ExpertCapacity::drop;
}

std::vector<int> groups_of(const Case& c) {
  std::vector<int> groups;
  const auto ranks = static_cast<int>(c.number(kRanks));
  for (int rank = 0; rank < ranks; ++rank) {
    switch (c.as<Groups>(kGroups)) {
      case Groups::none:
        break;
      case Groups::one:
        groups.push_back(0);
        break;
      case Groups::halves:
        groups.push_back(rank * 2 / ranks);
        break;
      case Groups::each:
        groups.push_back(rank);
        break;
    }
  }
  return groups;
}

void set_specs(CaseData& data) {
  const Case& c = data.config;
  const auto dtype = c.as<Dtype>(kDtype);
  data.max_tokens = c.max_tokens();
  data.given_row_bytes = c.number(kRowBytes);
  const std::int64_t hidden_size = data.given_row_bytes / naive::bytes_of(dtype);
  data.dispatch = {.layout = c.as<Layout>(kLayout),
                   .top_k = static_cast<int>(c.number(kTopK)),
                   .row_bytes = data.given_row_bytes,
                   .scale_bytes = c.as<Scales>(kScales) == Scales::none ? 0 : kGivenScaleBytes,
                   .max_tokens = data.max_tokens,
                   .receive_rows = c.number(kRanks) * data.max_tokens,
                   .expert_capacity = 0,
                   .drop = false,
                   .alignment = static_cast<int>(c.number(kAlignment)),
                   .token_base = c.number(kTokenBase)};
  if (const std::optional<ScaleFormat> format = scale_format(c)) {
    data.dispatch.row_bytes = hidden_size;
    const std::int64_t blocks = (hidden_size + 127) / 128;
    data.dispatch.scale_bytes = *format == ScaleFormat::ue8m0 ? (blocks + 3) / 4 * 4 : blocks * 4;
  }
  data.combine = {.dtype = dtype,
                  .out_dtype = c.as<Out>(kOut) == Out::caller_float32 ? Dtype::float32 : dtype,
                  .hidden_size = hidden_size,
                  .weighting = c.as<Weighting>(kWeighting),
                  .order = c.as<Order>(kOrder),
                  .fold = c.is(kFold),
                  .row_weights = c.is(kRowWeights),
                  .groups = groups_of(c)};
  data.backward = {
      .dtype = dtype, .out_dtype = dtype, .hidden_size = hidden_size, .row_weights = c.is(kRowWeights), .groups = groups_of(c)};
}

void set_options(CaseData& data, const Placement& placement) {
  const Case& c = data.config;
  data.options.max_tokens_per_rank = data.max_tokens;
  data.options.max_row_bytes = data.given_row_bytes;
  data.options.max_scale_bytes = data.dispatch.scale_bytes;
  data.options.top_k = static_cast<int>(c.number(kTopK));
  data.options.max_local_experts = std::max(placement.max_local_experts(), unused_placement(c).max_local_experts());
  data.options.max_fanout = placement.max_fanout();
  data.options.depth = static_cast<int>(c.number(kDepth));
  data.options.expert_rows = c.is(kExpertRows);
  data.options.unfolded = !c.is(kFold);
  data.options.reduction_groups = groups_of(c);
  data.options.mode = c.as<Mode>(kMode);
  data.options.device = c.device;
  data.options.transport = c.is(kMemory) ? Transport::shm : Transport::inproc;
  data.options.validate = c.is(kValidate);
  data.options.timeout_ms = 60'000;
  if (c.device != Device::cuda) return;
  data.options.transport = c.is(kMemory) ? Transport::cuda_peer : Transport::automatic;
  data.options.timeout_ms = 20'000;
}

}  // namespace

Placement library_placement(const Case& c) {
  const auto ranks = static_cast<int>(c.number(kRanks));
  const auto experts = static_cast<int>(c.number(kExperts));
  switch (c.as<Placed>(kPlacement)) {
    case Placed::uniform:
      return Placement::uniform(experts, ranks);
    case Placed::tensor_parallel:
      return Placement::tensor_parallel(experts, ranks / 2, 2);
    case Placed::empty_ranks:
      return Placement::custom(ranks, odd_ranks_only(c));
    default:
      return Placement::custom(ranks, replicas_of(c));
  }
}

Placement unused_placement(const Case& c) {
  return Placement::uniform(static_cast<int>(c.number(kExperts)) + 1, static_cast<int>(c.number(kRanks)));
}

Bytes random_values(std::uint64_t seed, std::int64_t count, Dtype dtype, bool with_specials) {
  static std::mutex mutex;
  static std::map<std::pair<Dtype, bool>, Bytes> pools;
  std::unique_lock lock(mutex);
  Bytes& pool = pools[{dtype, with_specials}];
  if (pool.empty()) pool = value_pool(dtype, with_specials);
  lock.unlock();  // the pool does not change any more, nor does it move
  const int size = naive::bytes_of(dtype);
  Random random(seed);
  Bytes bytes(count * size);
  std::uint64_t word = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    word = i % 5 == 0 ? random() : word >> kPoolBits;
    std::memcpy(&bytes[i * size], &pool[(word % kPoolValues) * size], size);
  }
  return bytes;
}

CaseData make_case_data(const Case& c) {
  CaseData data;
  data.config = c;
  data.placement = naive_placement(c);
  set_specs(data);
  set_capacities(data);
  set_options(data, library_placement(c));
  for (int index = 0; index < kRounds; ++index) data.rounds.push_back(make_round(data, index));
  return data;
}

}  // namespace tokenyard::exchange_test
