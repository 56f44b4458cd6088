// Every gate against a naive reference in double precision that shares no code with the library: lists, stable sorts, and
// the formulas of the table as they are written there. Where two scores that decide something differ by less than float32
// can tell, either choice is right, and the row is skipped.

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <random>

#include "tokenyard/routing.h"

namespace tokenyard {
namespace {

constexpr double kGap = 2e-6;  // what float32 scores may be off by
constexpr int kRows = 6;

struct Reference {
  std::vector<int> ids;
  std::vector<double> weights;
};

struct Candidate {
  double score;  // what decides
  double logit;  // two candidates with equal logit and bias have equal scores in any precision
  double bias;
  int expert;
};

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

// The best `count` in order, ties to the lower id (the input ascends); nothing when a decision is closer than `gap`.
std::optional<std::vector<Candidate>> best_of(std::vector<Candidate> candidates, int count, double gap) {
  std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
  for (int i = 0; i + 1 < std::ssize(candidates) && i < count; ++i) {
    const Candidate& a = candidates[i];
    const Candidate& b = candidates[i + 1];
    if (a.score - b.score < gap && (a.logit != b.logit || a.bias != b.bias)) return std::nullopt;
  }
  if (std::ssize(candidates) > count) candidates.resize(static_cast<std::size_t>(count));
  return candidates;
}

using Groups = std::vector<std::vector<Candidate>>;

// Candidates of the groups that stay eligible, ascending by id; each group decides by the sum of its `best` highest scores.
std::optional<std::vector<Candidate>> keep_groups(const Groups& groups, int keep, int best, double gap) {
  struct Ranked {
    std::vector<Candidate> top;
    double score;
    int group;
  };
  std::vector<Ranked> ranked;
  for (int g = 0; g < std::ssize(groups); ++g) {
    if (groups[g].empty()) continue;
    const auto top = best_of(groups[g], best, gap);
    if (!top) return std::nullopt;
    Ranked entry{*top, 0, g};
    for (const Candidate& candidate : entry.top) entry.score += candidate.score;
    ranked.push_back(entry);
  }
  std::stable_sort(ranked.begin(), ranked.end(), [](const Ranked& a, const Ranked& b) { return a.score > b.score; });
  for (int i = 0; i + 1 < std::ssize(ranked) && i < keep; ++i) {
    const auto same = [](const Candidate& a, const Candidate& b) { return a.logit == b.logit && a.bias == b.bias; };
    const Ranked& a = ranked[i];
    const Ranked& b = ranked[i + 1];
    const bool tie = std::equal(a.top.begin(), a.top.end(), b.top.begin(), b.top.end(), same);
    if (!tie && a.score - b.score < gap) return std::nullopt;
  }
  std::vector<Candidate> result;
  for (int i = 0; i < std::min<std::ptrdiff_t>(keep, std::ssize(ranked)); ++i) {
    result.insert(result.end(), groups[ranked[i].group].begin(), groups[ranked[i].group].end());
  }
  std::sort(result.begin(), result.end(), [](const Candidate& a, const Candidate& b) { return a.expert < b.expert; });
  return result;
}

bool by_sigmoid(const Gate& gate) {
  return gate.kind == GateKind::sigmoid ||
         (gate.score == Score::sigmoid && (gate.kind == GateKind::bias_corrected || gate.kind == GateKind::per_group));
}

// The score of each expert: what weights are made of.
std::vector<double> scores_of(const std::vector<double>& logits, const Gate& gate) {
  std::vector<double> scores;
  double sum = 0;
  for (const double logit : logits) {
    scores.push_back(!std::isfinite(logit) ? 0 : by_sigmoid(gate) ? logistic(logit) : std::exp(logit));
    sum += scores.back();
  }
  if (!by_sigmoid(gate)) {
    for (double& score : scores) score /= sum;
  }
  return scores;
}

std::vector<double> weights_at(const std::vector<int>& ids, const std::vector<double>& logits, const Gate& gate) {
  const std::vector<double> scores = scores_of(logits, gate);
  double sum = 0;
  for (const int id : ids) sum += id < 0 ? 0 : scores[id];
  std::vector<double> weights;
  for (const int id : ids) {
    const double weight = id < 0 ? 0 : scores[id];
    weights.push_back(gate.scale * (gate.renormalise && sum > 0 ? weight / (sum + gate.epsilon) : weight));
  }
  return weights;
}

std::optional<Reference> reference(const std::vector<double>& logits, const std::vector<double>& bias, const Gate& gate) {
  const std::vector<double> scores = scores_of(logits, gate);
  const int experts = static_cast<int>(logits.size());
  const bool by_logit = !by_sigmoid(gate) && gate.kind != GateKind::bias_corrected;
  const double gap = by_logit ? 0 : kGap;  // logits are exact in both precisions
  Groups groups(static_cast<std::size_t>(gate.num_groups));
  for (int e = 0; e < experts; ++e) {
    if (!std::isfinite(logits[e])) continue;
    const double score = by_logit ? logits[e] : scores[e] + (gate.kind == GateKind::bias_corrected ? bias[e] : 0);
    groups[e / (experts / gate.num_groups)].push_back({score, logits[e], bias[e], e});
  }
  std::optional<std::vector<Candidate>> eligible;
  if (gate.kind == GateKind::per_group) {
    eligible.emplace();
    for (const auto& group : groups) {
      const auto best = best_of(group, gate.top_k / gate.num_groups, gap);
      if (!best) return std::nullopt;
      eligible->insert(eligible->end(), best->begin(), best->end());
    }
    std::sort(eligible->begin(), eligible->end(), [](const Candidate& a, const Candidate& b) { return a.expert < b.expert; });
  } else {
    eligible = keep_groups(groups, gate.topk_groups, gate.kind == GateKind::bias_corrected ? 2 : 1, gap);
  }
  if (!eligible) return std::nullopt;
  const auto chosen = best_of(*eligible, gate.top_k, gap);
  if (!chosen) return std::nullopt;
  Reference result;
  for (const Candidate& candidate : *chosen) result.ids.push_back(candidate.expert);
  result.ids.resize(static_cast<std::size_t>(gate.top_k), -1);
  result.weights = weights_at(result.ids, logits, gate);
  return result;
}

struct Problem {
  int experts = 0;
  std::vector<float> logits;  // [kRows, experts]
  std::vector<float> bias;    // [experts]
  std::vector<std::uint8_t> mask;
  std::vector<std::int64_t> given;

  RoutingInput input(const Gate& gate) const {
    RoutingInput result{.logits = {logits.data(), Dtype::float32, {kRows, experts}}, .mask = {mask.data(), Dtype::uint8, {kRows}}};
    if (gate.kind == GateKind::bias_corrected) result.bias = {bias.data(), Dtype::float32, {experts}};
    return result;
  }
};

// Half of the problems on a coarse grid, with many ties; some with much that is not finite. The grid has no zero in it, as
// sigmoid(x) + sigmoid(-x) = 1 makes sums of different pairs equal on paper and unequal in any precision.
Problem random_problem(std::uint64_t seed, int experts, int top_k) {
  std::mt19937_64 random(seed);
  Problem problem{experts, {}, {}, {}, {}};
  const bool coarse = random() % 2 == 0;
  const bool broken = random() % 4 == 0;
  const bool biased = random() % 2 == 0;
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), -kInf, kInf, -std::numeric_limits<float>::quiet_NaN()};
  std::normal_distribution<float> normal(0.0F, 2.0F);
  for (int i = 0; i < kRows * experts; ++i) {
    const float value = coarse ? (static_cast<float>(random() % 25) - 12.3F) / 4 : normal(random);
    problem.logits.push_back(broken && random() % 3 != 0 ? bad[random() % 4] : value);
  }
  for (int e = 0; e < experts; ++e) problem.bias.push_back(biased ? normal(random) / 8 : 0.25F);
  for (int t = 0; t < kRows; ++t) problem.mask.push_back(random() % 8 == 0 ? 0 : 1);
  for (int i = 0; i < kRows * top_k; ++i) {
    problem.given.push_back(static_cast<std::int64_t>(random() % (static_cast<std::uint64_t>(experts) + 2)) - 2);
  }
  return problem;
}

struct Shape {
  int experts, top_k, num_groups, topk_groups;
};

void showValue(const Shape& shape, std::ostream& out) {
  out << shape.experts << " experts, top " << shape.top_k << ", " << shape.num_groups << " groups keep " << shape.topk_groups;
}

rc::Gen<Shape> any_shape() {
  return rc::gen::element<Shape>(Shape{1, 1, 1, 1}, Shape{7, 2, 1, 1}, Shape{7, 7, 7, 7}, Shape{8, 2, 4, 2}, Shape{16, 6, 4, 2},
                                 Shape{60, 4, 10, 3}, Shape{64, 8, 8, 4}, Shape{64, 8, 8, 8}, Shape{96, 64, 3, 2}, Shape{257, 9, 1, 1},
                                 Shape{256, 8, 8, 4});
}

std::vector<double> row_of(const Problem& problem, int token) {
  const auto begin = problem.logits.begin() + static_cast<std::ptrdiff_t>(token) * problem.experts;
  return {begin, begin + problem.experts};
}

void compare_row(const Routing& routing, int token, const std::vector<int>& ids, const std::vector<double>& weights, double scale) {
  for (int k = 0; k < routing.top_k; ++k) {
    const auto slot = static_cast<std::size_t>(token * routing.top_k + k);
    RC_ASSERT(routing.topk_ids[slot] == ids[static_cast<std::size_t>(k)]);
    RC_ASSERT(std::abs(routing.topk_weights[slot] - weights[static_cast<std::size_t>(k)]) <= 2e-6 * std::abs(scale));
  }
}

// Rows of a random problem through the library and the reference. Returns how many were decided by the reference.
int compare(const Gate& gate, const Shape& shape) {
  const auto seed = *rc::gen::arbitrary<std::uint64_t>();  // printed with a failure; replays it
  const Problem problem = random_problem(seed, shape.experts, gate.top_k);
  const Routing routing = route(problem.input(gate), gate);
  const std::vector<double> bias(problem.bias.begin(), problem.bias.end());
  int decided = 0;
  for (int token = 0; token < kRows; ++token) {
    auto expected = reference(row_of(problem, token), bias, gate);
    if (problem.mask[static_cast<std::size_t>(token)] == 0) {
      const auto slots = static_cast<std::size_t>(gate.top_k);
      expected = Reference{std::vector<int>(slots, -1), std::vector<double>(slots, 0)};
    }
    if (!expected) continue;
    ++decided;
    compare_row(routing, token, expected->ids, expected->weights, gate.scale);
  }
  return decided;
}

float any_scale() { return *rc::gen::element(1.0F, 2.5F, -0.5F); }
Score any_score() { return *rc::gen::element(Score::softmax, Score::sigmoid); }

RC_GTEST_PROP(RoutingReference, Softmax, ()) {
  const Shape shape = *any_shape();
  const Gate gate = Gate::softmax(shape.top_k, *rc::gen::arbitrary<bool>(), any_scale());
  RC_ASSERT(compare(gate, shape) == kRows);
}

RC_GTEST_PROP(RoutingReference, Sigmoid, ()) {
  const Shape shape = *any_shape();
  const Gate gate = Gate::sigmoid(shape.top_k, *rc::gen::arbitrary<bool>(), any_scale(), *rc::gen::element(0.0F, 0.125F));
  const int decided = compare(gate, shape);
  RC_CLASSIFY(decided == kRows, "all rows decided");
}

RC_GTEST_PROP(RoutingReference, GroupedMax, ()) {
  const Shape shape = *any_shape();
  const Gate gate = Gate::grouped_max(shape.top_k, shape.num_groups, shape.topk_groups, *rc::gen::arbitrary<bool>(), any_scale());
  RC_ASSERT(compare(gate, shape) == kRows);
}

RC_GTEST_PROP(RoutingReference, BiasCorrected, ()) {
  const Shape shape = *any_shape();
  const bool renormalise = *rc::gen::arbitrary<bool>();
  const Gate gate = Gate::bias_corrected(shape.top_k, any_score(), shape.num_groups, shape.topk_groups, renormalise, any_scale());
  const int decided = compare(gate, shape);
  RC_CLASSIFY(decided == kRows, "all rows decided");
}

int common_groups(const Shape& shape) { return std::gcd(std::gcd(shape.top_k, shape.experts), shape.num_groups); }

RC_GTEST_PROP(RoutingReference, PerGroup, ()) {
  const Shape shape = *any_shape();
  const Gate gate = Gate::per_group(shape.top_k, common_groups(shape), any_score(), *rc::gen::arbitrary<bool>(), any_scale());
  const int decided = compare(gate, shape);
  RC_CLASSIFY(decided == kRows, "all rows decided");
}

Gate any_gate(const Shape& shape) {
  const bool renormalise = *rc::gen::arbitrary<bool>();
  switch (*rc::gen::inRange(0, 5)) {
    case 0:
      return Gate::softmax(shape.top_k, renormalise, any_scale());
    case 1:
      return Gate::sigmoid(shape.top_k, renormalise, any_scale());
    case 2:
      return Gate::grouped_max(shape.top_k, shape.num_groups, shape.topk_groups, renormalise, any_scale());
    case 3:
      return Gate::bias_corrected(shape.top_k, any_score(), shape.num_groups, shape.topk_groups, renormalise, any_scale());
    default:
      return Gate::per_group(shape.top_k, common_groups(shape), any_score(), renormalise, any_scale());
  }
}

RC_GTEST_PROP(RoutingReference, Given, ()) {
  const Shape shape = *any_shape();
  const Gate gate = any_gate(shape);
  const Problem problem = random_problem(*rc::gen::arbitrary<std::uint64_t>(), shape.experts, gate.top_k);
  RoutingInput input = problem.input(gate);
  input.given_ids = {problem.given.data(), Dtype::int64, {kRows, gate.top_k}};
  const Routing routing = route(input, gate);
  for (int token = 0; token < kRows; ++token) {
    const std::vector<double> logits = row_of(problem, token);
    const bool none = problem.mask[static_cast<std::size_t>(token)] == 0 ||
                      std::none_of(logits.begin(), logits.end(), [](double logit) { return std::isfinite(logit); });
    std::vector<int> ids;
    for (int k = 0; k < gate.top_k; ++k) {
      const std::int64_t id = problem.given[static_cast<std::size_t>(token * gate.top_k + k)];
      ids.push_back(none || id < 0 ? -1 : static_cast<int>(id));
    }
    compare_row(routing, token, ids, weights_at(ids, logits, gate), gate.scale);
  }
}

// Replaying what a gate chose gives its weights again, bit for bit.
RC_GTEST_PROP(RoutingReference, ReplayIsExact, ()) {
  const Shape shape = *any_shape();
  const Gate gate = any_gate(shape);
  const Problem problem = random_problem(*rc::gen::arbitrary<std::uint64_t>(), shape.experts, gate.top_k);
  RoutingInput input = problem.input(gate);
  const Routing first = route(input, gate);
  input.given_ids = first.ids_view();
  const Routing again = route(input, gate);
  RC_ASSERT(again.topk_ids == first.topk_ids);
  RC_ASSERT(again.topk_weights == first.topk_weights);
  RC_ASSERT(again.load == first.load);
}

RC_GTEST_PROP(RoutingReference, Invariants, ()) {
  const Shape shape = *any_shape();
  const Gate gate = any_gate(shape);
  const Problem problem = random_problem(*rc::gen::arbitrary<std::uint64_t>(), shape.experts, gate.top_k);
  const Routing routing = route(problem.input(gate), gate);
  std::vector<std::int64_t> load(static_cast<std::size_t>(shape.experts), 0);
  for (int token = 0; token < kRows; ++token) {
    const auto begin = static_cast<std::size_t>(token * gate.top_k);
    double sum = 0;
    bool ended = false;
    std::vector<bool> seen(load.size(), false);
    for (std::size_t slot = begin; slot < begin + static_cast<std::size_t>(gate.top_k); ++slot) {
      const std::int64_t id = routing.topk_ids[slot];
      RC_ASSERT(std::isfinite(routing.topk_weights[slot]));
      sum += routing.topk_weights[slot];
      ended = ended || id < 0;
      RC_ASSERT(ended == (id < 0));  // empty slots come last
      if (ended) {
        RC_ASSERT(id == -1);
        RC_ASSERT(routing.topk_weights[slot] == 0.0F);
        continue;
      }
      const auto expert = static_cast<std::size_t>(id);
      RC_ASSERT(!seen[expert]);
      seen[expert] = true;
      ++load[expert];
      RC_ASSERT(std::isfinite(problem.logits[static_cast<std::size_t>(token * shape.experts) + expert]));
    }
    if (gate.renormalise && routing.topk_ids[begin] >= 0) RC_ASSERT(std::abs(sum - gate.scale) < 1e-5);
  }
  RC_ASSERT(routing.load == load);
}

// 16-bit logits route as the float32 numbers they stand for; strides do not matter.
RC_GTEST_PROP(RoutingReference, DtypesAndStrides, ()) {
  const Shape shape = *any_shape();
  const Gate gate = any_gate(shape);
  const bool half = *rc::gen::arbitrary<bool>();
  Problem problem = random_problem(*rc::gen::arbitrary<std::uint64_t>(), shape.experts, gate.top_k);
  // Stored transposed: [experts, kRows], read as [kRows, experts].
  std::vector<std::uint16_t> narrow(problem.logits.size());
  for (int token = 0; token < kRows; ++token) {
    for (int e = 0; e < shape.experts; ++e) {
      float& logit = problem.logits[static_cast<std::size_t>(token * shape.experts + e)];
      const std::uint16_t bits = half ? float_to_float16(logit) : float_to_bfloat16(logit);
      narrow[static_cast<std::size_t>(e * kRows + token)] = bits;
      logit = half ? float16_to_float(bits) : bfloat16_to_float(bits);
    }
  }
  RoutingInput input = problem.input(gate);
  const Routing wide = route(input, gate);
  input.logits = {narrow.data(), half ? Dtype::float16 : Dtype::bfloat16, {kRows, shape.experts}};
  input.logits.strides = {1, kRows, 0, 0};
  const Routing strided = route(input, gate);
  RC_ASSERT(strided.topk_ids == wide.topk_ids);
  RC_ASSERT(strided.topk_weights == wide.topk_weights);
}

// The comparison above skips close calls; here is proof that it does not skip much.
TEST(RoutingReference, MostRowsAreDecided) {
  int decided = 0;
  int rows = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const Problem problem = random_problem(seed, 64, 8);
    const Gate gate = Gate::bias_corrected(8, Score::sigmoid, 8, 4, true);
    const std::vector<double> bias(problem.bias.begin(), problem.bias.end());
    for (int token = 0; token < kRows; ++token, ++rows) decided += reference(row_of(problem, token), bias, gate).has_value() ? 1 : 0;
  }
  EXPECT_GE(decided, rows * 9 / 10) << "of " << rows;
}

}  // namespace
}  // namespace tokenyard
