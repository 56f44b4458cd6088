#include <fmt/core.h>

#include <algorithm>
#include <random>

#include "core/usage.h"
#include "verify.h"

namespace tokenyard::cli {
namespace {

// A case with 48 tokens per rank of 64 bfloat16, top-4 of 32 experts; callers change what they are about.
VerifyCase base_case(std::string what, int ranks, std::uint64_t seed) {
  VerifyCase one;
  one.what = std::move(what);
  one.workload.seed = seed;
  one.workload.popularity_seed = seed;
  one.workload.tokens.assign(static_cast<std::size_t>(ranks), 48);
  one.workload.hidden_size = 64;
  one.workload.num_experts = 32;
  one.workload.gate = Gate::softmax(4, true);
  return one;
}

template <class T>
T pick(std::mt19937_64& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

// Everything at once, drawn; what cannot go together is put right afterwards.
VerifyCase random_case(int index, int ranks, std::uint64_t seed) {
  std::mt19937_64 random(seed * 1'000'003 + static_cast<std::uint64_t>(index));
  VerifyCase one = base_case("", ranks, seed + static_cast<std::uint64_t>(index));
  Workload& workload = one.workload;
  workload.num_experts = pick(random, {1, 7, 16, 64, 257});
  workload.gate = Gate::softmax(std::min(pick(random, {1, 2, 6, 8, 9, 22}), workload.num_experts), true);
  workload.hidden_size = pick<std::int64_t>(random, {16, 72, 128, 1024});
  workload.dtype = pick(random, {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16, Dtype::float8_e4m3});
  if (workload.dtype == Dtype::float8_e4m3) workload.hidden_size = (workload.hidden_size + 15) / 16 * 16;
  workload.skew = pick(random, {0.0, 0.5, 1.5});
  for (std::int64_t& tokens : workload.tokens) tokens = pick<std::int64_t>(random, {0, 1, 5, 33, 60});
  one.placement = pick<std::string>(random, {"uniform", "tensor parallel", "replicated", "custom"});
  one.mode = pick(random, {Mode::throughput, Mode::throughput, Mode::latency});
  one.dispatch.layout = pick(random, {Layout::token_major, Layout::expert_major, Layout::expert_padded, Layout::rank_slots});
  if (one.dispatch.layout == Layout::rank_slots) one.mode = Mode::latency;
  one.dispatch.sizing = one.mode == Mode::latency ? Sizing::capacity : pick(random, {Sizing::exact, Sizing::capacity});
  one.dispatch.alignment = one.dispatch.layout == Layout::expert_major ? pick(random, {1, 16, 128}) : 1;
  const bool folded_by_caller = one.dispatch.layout == Layout::token_major || one.dispatch.layout == Layout::rank_slots;
  one.weighting = folded_by_caller ? Weighting::none : pick(random, {Weighting::none, Weighting::at_expert, Weighting::at_source});
  one.order = pick(random, {Order::rank_ascending, Order::topk});
  one.threads = pick(random, {1, 3});
  one.what = fmt::format("random {}: {}, {}, {}, {} {} of {}, top-{} of {}, {}, {}, {}, {} thread(s)", index, name(one.dispatch.layout),
                         name(one.mode), name(one.dispatch.sizing), *std::max_element(workload.tokens.begin(), workload.tokens.end()),
                         "tokens", fmt::format("{} {}", workload.hidden_size, name(workload.dtype)), workload.top_k(), workload.num_experts,
                         one.placement, name(one.weighting), name(one.order), one.threads);
  return one;
}

std::vector<VerifyCase> layout_cases(int ranks, std::uint64_t seed) {
  std::vector<VerifyCase> cases;
  const auto add = [&](const char* what, auto&& change) {
    cases.push_back(base_case(what, ranks, seed));
    change(cases.back());
  };
  add("token_major, exact", [](VerifyCase&) {});
  add("token_major, capacity, gather map", [](VerifyCase& c) {
    c.dispatch.sizing = Sizing::capacity;
    c.dispatch.gather_map = true;
    c.same_bits_as = "token_major, exact";
  });
  add("token_major, 3 threads", [](VerifyCase& c) {
    c.threads = 3;
    c.same_bits_as = "token_major, exact";
  });
  add("rank_slots, latency mode", [](VerifyCase& c) {
    c.mode = Mode::latency;
    c.dispatch.layout = Layout::rank_slots;
    c.dispatch.sizing = Sizing::capacity;
    c.same_bits_as = "token_major, exact";
  });
  add("expert_major, aligned to 16, weighted at the expert", [](VerifyCase& c) {
    c.dispatch.layout = Layout::expert_major;
    c.dispatch.alignment = 16;
    c.weighting = Weighting::at_expert;
  });
  add("expert_major, weighted at the source", [](VerifyCase& c) {
    c.dispatch.layout = Layout::expert_major;
    c.weighting = Weighting::at_source;
    c.same_bits_as = "expert_major, aligned to 16, weighted at the expert";
  });
  add("expert_padded, capacity", [](VerifyCase& c) {
    c.dispatch.layout = Layout::expert_padded;
    c.dispatch.sizing = Sizing::capacity;
    c.weighting = Weighting::at_expert;
    c.same_bits_as = "expert_major, aligned to 16, weighted at the expert";
  });
  add("expert_padded, latency mode", [](VerifyCase& c) {
    c.mode = Mode::latency;
    c.dispatch.layout = Layout::expert_padded;
    c.dispatch.sizing = Sizing::capacity;
    c.weighting = Weighting::at_expert;
    c.same_bits_as = "expert_major, aligned to 16, weighted at the expert";
  });
  add("expert_major, sums in top-k order", [](VerifyCase& c) {
    c.dispatch.layout = Layout::expert_major;
    c.weighting = Weighting::at_expert;
    c.order = Order::topk;
  });
  return cases;
}

std::vector<VerifyCase> shape_cases(int ranks, std::uint64_t seed) {
  std::vector<VerifyCase> cases;
  const auto add = [&](const char* what, auto&& change) {
    cases.push_back(base_case(what, ranks, seed));
    change(cases.back());
  };
  for (const Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::float16, Dtype::float8_e4m3}) {
    add("", [&](VerifyCase& c) {
      c.what = fmt::format("rows of {}{}", name(dtype), dtype == Dtype::float8_e4m3 ? " with scales" : "");
      c.workload.dtype = dtype;
    });
  }
  add("top-1 of 7", [](VerifyCase& c) {
    c.workload.num_experts = 7;
    c.workload.gate = Gate::softmax(1, true);
  });
  add("top-22 of 257, expert_major", [](VerifyCase& c) {
    c.workload.num_experts = 257;
    c.workload.gate = Gate::softmax(22, true);
    c.dispatch.layout = Layout::expert_major;
  });
  add("more ranks than experts", [](VerifyCase& c) {
    c.workload.num_experts = std::max(1, c.workload.ranks() - 1);
    c.workload.gate = Gate::softmax(1, true);
  });
  add("skewed routing", [](VerifyCase& c) { c.workload.skew = 1.5; });
  add("no tokens on rank 0", [](VerifyCase& c) { c.workload.tokens[0] = 0; });
  add("no tokens anywhere", [](VerifyCase& c) { std::fill(c.workload.tokens.begin(), c.workload.tokens.end(), 0); });
  add("tokens without any expert", [](VerifyCase& c) { c.workload.pattern = IdPattern::none; });
  add("one expert takes everything", [](VerifyCase& c) { c.workload.pattern = IdPattern::one_expert; });
  add("a token names an expert twice, expert_major", [](VerifyCase& c) {
    c.workload.pattern = IdPattern::duplicates;
    c.dispatch.layout = Layout::expert_major;
  });
  for (const char* placement : {"tensor parallel", "replicated", "custom"}) {
    add("", [&](VerifyCase& c) {
      c.what = fmt::format("{} placement", placement);
      c.placement = placement;
    });
  }
  return cases;
}

// Two shards of every third expert, one of the others; whatever the ranks.
Placement custom_placement(int num_experts, int ranks) {
  std::vector<std::vector<Replica>> replicas(static_cast<std::size_t>(num_experts));
  for (int e = 0; e < num_experts; ++e) {
    Replica replica;
    replica.shard_ranks = {e % ranks};
    if (e % 3 == 0 && ranks > 1) replica.shard_ranks.push_back((e + 1) % ranks);
    replicas[static_cast<std::size_t>(e)] = {replica};
  }
  return Placement::custom(ranks, replicas);
}

}  // namespace

std::vector<VerifyCase> verify_cases(int ranks, int random, std::uint64_t seed) {
  std::vector<VerifyCase> cases = layout_cases(ranks, seed);
  const std::vector<VerifyCase> shapes = shape_cases(ranks, seed);
  cases.insert(cases.end(), shapes.begin(), shapes.end());
  for (int i = 0; i < random; ++i) cases.push_back(random_case(i, ranks, seed));
  return cases;
}

Placement placement_of(const VerifyCase& one) {
  const int experts = one.workload.num_experts;
  const int ranks = one.workload.ranks();
  if (one.placement == "uniform") return Placement::uniform(experts, ranks);
  if (one.placement == "tensor parallel")
    return Placement::tensor_parallel(experts, ranks % 2 == 0 ? ranks / 2 : 1, ranks % 2 == 0 ? 2 : ranks);
  if (one.placement == "replicated") {
    const std::vector<double> load = popularity(experts, one.workload.skew, one.workload.popularity_seed);
    return Placement::replicated(experts, ranks, load, ranks > 1 ? std::min(4, experts) : 0);
  }
  TY_ASSERT(one.placement == "custom");
  return custom_placement(experts, ranks);
}

}  // namespace tokenyard::cli
