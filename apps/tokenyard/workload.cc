#include "workload.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "core/usage.h"

namespace tokenyard::cli {
namespace {

// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators"): any seed, also 0, 1, 2, gives good bits.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  // A stream of its own for each (seed, what, rank, token).
  Random(std::uint64_t seed, std::uint64_t what, int rank, std::int64_t token) : state_(seed) {
    for (const std::uint64_t word : {what, static_cast<std::uint64_t>(rank), static_cast<std::uint64_t>(token)}) state_ = next() ^ word;
  }
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  // In (0, 1).
  double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

enum Stream : std::uint64_t { kRowStream, kScaleStream, kRoutingStream, kPopularityStream };

// Which bits of an element are random, and the exponent bits that all have: finite, never zero, 8 significant bits at most.
struct ElementBits {
  std::uint64_t random;
  std::uint64_t fixed;
};

ElementBits element_bits(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return {0x803fe00000000000U, 0x3fc0000000000000U};
    case Dtype::float32:
      return {0x81ff000081ff0000U, 0x3e0000003e000000U};
    case Dtype::bfloat16:
      return {0x81ff81ff81ff81ffU, 0x3e003e003e003e00U};
    case Dtype::float16:
      return {0x8ff88ff88ff88ff8U, 0x3000300030003000U};
    case Dtype::float8_e4m3:
      return {0x8f8f8f8f8f8f8f8fU, 0x3030303030303030U};
    default:
      usage_error("rows of {} cannot be generated; use float64, float32, bfloat16, float16 or float8_e4m3", name(dtype));
  }
}

void draw_ids(const Workload& workload, int rank, Routing& routing) {
  constexpr std::int64_t kChunk = 1024;  // bounds the memory of the logits
  const std::vector<double> weights = popularity(workload.num_experts, workload.skew, workload.popularity_seed);
  const std::int64_t experts = workload.num_experts;
  std::vector<float> log_popularity(weights.size());
  std::transform(weights.begin(), weights.end(), log_popularity.begin(), [](double w) { return static_cast<float>(std::log(w)); });
  std::vector<float> logits;
  const std::vector<float> bias(weights.size(), 0.0F);
  for (std::int64_t begin = 0; begin < workload.tokens[rank]; begin += kChunk) {
    const std::int64_t count = std::min(kChunk, workload.tokens[rank] - begin);
    logits.resize(static_cast<std::size_t>(count * experts));
    for (std::int64_t t = 0; t < count; ++t) {
      Random random(workload.seed, kRoutingStream, rank, begin + t);
      // The Gumbel trick: the k largest of log p + Gumbel noise are k draws from p without replacement.
      for (std::int64_t e = 0; e < experts; ++e) {
        logits[t * experts + e] = log_popularity[e] - static_cast<float>(std::log(-std::log(random.uniform())));
      }
    }
    RoutingInput input;
    input.logits = {logits.data(), Dtype::float32, {count, experts}};
    if (workload.gate.kind == GateKind::bias_corrected) input.bias = {bias.data(), Dtype::float32, {experts}};
    const Routing part = route(input, workload.gate);
    routing.topk_ids.insert(routing.topk_ids.end(), part.topk_ids.begin(), part.topk_ids.end());
    routing.topk_weights.insert(routing.topk_weights.end(), part.topk_weights.begin(), part.topk_weights.end());
  }
}

std::int64_t patterned_id(const Workload& workload, std::int64_t token, int k) {
  switch (workload.pattern) {
    case IdPattern::one_expert:
      return k == 0 ? 0 : -1;
    case IdPattern::duplicates:
      return token % workload.num_experts;
    default:
      return -1;
  }
}

void pattern_ids(const Workload& workload, int rank, Routing& routing) {
  for (std::int64_t t = 0; t < workload.tokens[rank]; ++t) {
    Random random(workload.seed, kRoutingStream, rank, t);
    for (int k = 0; k < workload.top_k(); ++k) {
      routing.topk_ids.push_back(patterned_id(workload, t, k));
      routing.topk_weights.push_back(static_cast<float>(random.uniform()));
    }
  }
}

}  // namespace

std::vector<double> popularity(int num_experts, double skew, std::uint64_t seed) {
  std::vector<double> weights(static_cast<std::size_t>(num_experts));
  for (int i = 0; i < num_experts; ++i) weights[i] = std::pow(i + 1.0, -skew);
  Random random(seed, kPopularityStream, 0, 0);
  for (int i = num_experts - 1; i > 0; --i) std::swap(weights[i], weights[random.next() % static_cast<std::uint64_t>(i + 1)]);
  return weights;
}

void fill_row(const Workload& workload, int rank, std::int64_t token, std::byte* row) {
  Random random(workload.seed, kRowStream, rank, token);
  const ElementBits bits = element_bits(workload.dtype);
  for (std::int64_t at = 0; at < workload.row_bytes(); at += 8) {  // a row is a multiple of 16 bytes
    const std::uint64_t word = (random.next() & bits.random) | bits.fixed;
    std::memcpy(row + at, &word, 8);
  }
}

void fill_scales(const Workload& workload, int rank, std::int64_t token, float* scales) {
  Random random(workload.seed, kScaleStream, rank, token);
  for (std::int64_t c = 0; c < workload.scale_columns(); ++c) scales[c] = static_cast<float>(random.uniform());
}

Routing draw_routing(const Workload& workload, int rank) {
  Routing routing;
  routing.top_k = workload.top_k();
  if (workload.pattern == IdPattern::drawn) {
    draw_ids(workload, rank, routing);
  } else {
    pattern_ids(workload, rank, routing);
  }
  return routing;
}

Batch make_batch(const Workload& workload, int rank) {
  const std::int64_t tokens = workload.tokens[rank];
  Batch batch;
  batch.routing = draw_routing(workload, rank);
  batch.rows.resize(static_cast<std::size_t>(tokens * workload.row_bytes()));
  batch.scales.resize(static_cast<std::size_t>(tokens * workload.scale_columns()));
  for (std::int64_t t = 0; t < tokens; ++t) {
    fill_row(workload, rank, t, batch.rows.data() + t * workload.row_bytes());
    fill_scales(workload, rank, t, batch.scales.data() + t * workload.scale_columns());
  }
  batch.input.rows = {batch.rows.data(), workload.dtype, {tokens, workload.hidden_size}};
  if (workload.scale_columns() > 0) batch.input.scales = {batch.scales.data(), Dtype::float32, {tokens, workload.scale_columns()}};
  batch.input.topk_ids = batch.routing.ids_view();
  batch.input.topk_weights = batch.routing.weights_view();
  return batch;
}

void decode(Dtype dtype, const std::byte* row, std::vector<float>& values) {
  const auto each = [&](auto element, auto convert) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      std::memcpy(&element, row + i * sizeof element, sizeof element);
      values[i] = convert(element);
    }
  };
  switch (dtype) {
    case Dtype::float64:
      return each(double{}, [](double x) { return static_cast<float>(x); });
    case Dtype::float32:
      return each(float{}, [](float x) { return x; });
    case Dtype::bfloat16:
      return each(std::uint16_t{}, bfloat16_to_float);
    case Dtype::float16:
      return each(std::uint16_t{}, float16_to_float);
    case Dtype::float8_e4m3:
      return each(std::uint8_t{}, float8_e4m3_to_float);
    default:
      TY_ASSERT(false);
  }
}

void encode(Dtype dtype, const std::vector<float>& values, std::byte* row) {
  const auto each = [&](auto convert) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto element = convert(values[i]);
      std::memcpy(row + i * sizeof element, &element, sizeof element);
    }
  };
  switch (dtype) {
    case Dtype::float64:
      return each([](float x) { return static_cast<double>(x); });
    case Dtype::float32:
      return each([](float x) { return x; });
    case Dtype::bfloat16:
      return each(float_to_bfloat16);
    case Dtype::float16:
      return each(float_to_float16);
    default:
      TY_ASSERT(false);
  }
}

float rounded(Dtype dtype, double value) {
  const float single = static_cast<float>(value);
  if (dtype == Dtype::bfloat16) return bfloat16_to_float(float_to_bfloat16(single));
  if (dtype == Dtype::float16) return float16_to_float(float_to_float16(single));
  return single;
}

}  // namespace tokenyard::cli
