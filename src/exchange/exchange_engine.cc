#include "exchange/exchange_engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>

#include "core/log.h"
#include "core/usage.h"
#include "exchange/memory_plan.h"

namespace tokenyard::exchange_internal {
namespace {

std::atomic<std::uint64_t> next_exchange_id{1};

ExchangeOptions with_timeout(ExchangeOptions options, const World& world) {
  if (options.timeout_ms == 0) options.timeout_ms = world.timeout_ms();
  return options;
}

// Every option that ranks must share, as text: a mismatch is shown as it stands.
std::string shared_options(const ExchangeOptions& o) {
  std::string text = fmt::format(
      "max_tokens_per_rank = {}, max_row_bytes = {}, max_scale_bytes = {}, top_k = {}, max_local_experts = {}, max_fanout = {}, "
      "receive_rows = {}, "
      "max_expert_rows = {}, depth = {}, expert_rows = {}, unfolded = {}, transport = {}, device = {}, timeout_ms = {}",
      o.max_tokens_per_rank, o.max_row_bytes, o.max_scale_bytes, o.top_k, o.max_local_experts, o.max_fanout, o.receive_rows,
      o.max_expert_rows, o.depth, o.expert_rows, o.unfolded, name(o.transport), name(o.device), o.timeout_ms);
  text += ", reduction_groups = [";
  for (const int group : o.reduction_groups) text += fmt::format("{} ", group);
  return text + "]";
}

// The first "name = value" in which two option texts differ.
std::pair<std::string, std::string> first_difference(const std::string& mine, const std::string& theirs) {
  std::size_t at = 0;
  while (at < std::min(mine.size(), theirs.size()) && mine[at] == theirs[at]) ++at;
  const std::size_t before = mine.rfind(", ", at);
  const std::size_t begin = before == std::string::npos ? 0 : before + 2;
  auto item = [begin](const std::string& text) { return text.substr(begin, text.find(", ", begin) - begin); };
  return {item(mine), item(theirs)};
}

}  // namespace

void ReceivedState::give_back(void* stream) {
  if (lease && before_free) {
    readers.push_back(stream);
    for (void* const reader : readers) before_free(reader);
  }
  readers.clear();
  lease.reset();
}

ReceivedState::~ReceivedState() {
  try {
    give_back(nullptr);
  } catch (const std::exception& error) {
    log_info("exchange: while rows were given back: {}", error.what());
  }
}

RegisteredPlacement registered(const Placement& placement, int rank) {
  RegisteredPlacement entry{placement, std::vector<std::int32_t>(placement.local_experts(rank).size(), 0)};
  for (const Instance& instance : placement.instances()) {
    if (instance.rank != rank) continue;
    const auto& shards = placement.replicas(instance.expert)[instance.replica].shard_ranks;
    entry.shard_ordinals[instance.local_index] =
        static_cast<std::int32_t>(std::count_if(shards.begin(), shards.end(), [rank](int other) { return other < rank; }));
  }
  return entry;
}

ExchangeEngine::ExchangeEngine(const World& world, const ExchangeOptions& options)
    : world_(world),
      options_(checked_options(with_timeout(options, world), world.size())),
      shape_(shape_of(options_, world.size())),
      id_(next_exchange_id++) {
  agree_on_options();
}

void ExchangeEngine::agree_on_options() {
  const std::string mine = shared_options(options_);
  const auto all = world_.all_gather(std::as_bytes(std::span(mine)));
  for (int peer = 0; peer < world_.size(); ++peer) {
    const std::string theirs(reinterpret_cast<const char*>(all[peer].data()), all[peer].size());
    if (theirs == mine) continue;
    const auto [ours, other] = first_difference(mine, theirs);
    Failure failure{.kind = FailureKind::mismatch, .phase = Phase::gather, .rank = world_.rank(), .peer = peer};
    failure.detail =
        fmt::format("exchange options differ: rank {} has {}, rank {} has {}; give all ranks the same", world_.rank(), ours, peer, other);
    throw TransportError(std::move(failure));
  }
}

int ExchangeEngine::add(const Placement& placement) {
  if (placement.ranks() != world_.size())
    usage_error("the placement is for {} ranks; this exchange has {}", placement.ranks(), world_.size());
  if (placement.max_local_experts() > options_.max_local_experts) {
    usage_error("the placement puts {} experts on one rank; the exchange was made for max_local_experts = {}",
                placement.max_local_experts(), options_.max_local_experts);
  }
  if (placement.max_fanout() > options_.max_fanout) {
    usage_error("the placement cuts an expert into {} shards; the exchange was made for max_fanout = {}", placement.max_fanout(),
                options_.max_fanout);
  }
  const std::uint64_t mine[2] = {placement.hash(), placements_.size()};
  const auto all = world_.all_gather(std::as_bytes(std::span(mine)));
  for (int peer = 0; peer < world_.size(); ++peer) {
    std::uint64_t theirs[2];
    std::memcpy(theirs, all[peer].data(), sizeof theirs);
    if (theirs[0] == mine[0] && theirs[1] == mine[1]) continue;
    Failure failure{.kind = FailureKind::mismatch, .phase = Phase::gather, .rank = world_.rank(), .peer = peer};
    failure.detail = fmt::format("rank {} adds placement {:x} as number {}, rank {} adds {:x} as number {}", world_.rank(), mine[0],
                                 mine[1], peer, theirs[0], theirs[1]);
    throw TransportError(std::move(failure));
  }
  wait_idle();
  placements_.push_back(registered(placement, world_.rank()));
  placements_changed();
  return static_cast<int>(placements_.size()) - 1;
}

ExchangeOptions ExchangeEngine::options_without_lost(const std::vector<int>& survivors) const {
  ExchangeOptions options = options_;
  const auto ranks = static_cast<std::int64_t>(survivors.size());
  options.receive_rows = std::min(options.receive_rows, ranks * options.max_tokens_per_rank);
  options.max_fanout = static_cast<int>(std::min<std::int64_t>(options.max_fanout, ranks));
  if (options.reduction_groups.empty()) return options;
  std::map<int, int> renumbered;
  for (const int rank : survivors) renumbered[options.reduction_groups[rank]] = 0;
  int next = 0;
  for (auto& [group, number] : renumbered) number = next++;
  std::vector<int> groups;
  for (const int rank : survivors) groups.push_back(renumbered[options.reduction_groups[rank]]);
  options.reduction_groups = std::move(groups);
  return options;
}

void ExchangeEngine::shrink_to(const Survivors& left, const ExchangeOptions& options) {
  world_ = left.world;
  options_ = options;
  shape_ = shape_of(options, left.world.size());
  id_ = next_exchange_id++;
  for (RegisteredPlacement& entry : placements_) entry = registered(entry.placement.restricted_to(left.ranks), world_.rank());
  placements_changed();
}

int ExchangeEngine::placement_of(const DispatchOptions& options, const HandleFacts* cached) const {
  if (cached != nullptr) return cached->placement;
  const int placement = options.placement.value_or(0);
  if (placement < 0 || placement >= static_cast<int>(placements_.size()))
    usage_error("placement = {}; this exchange has placements 0 to {}", placement, placements_.size() - 1);
  return placement;
}

void ExchangeEngine::abandon(const std::string&) {
  try {
    dispatch({}, {}, nullptr);
  } catch (const UsageError&) {  // which peers have been told
  }
}

}  // namespace tokenyard::exchange_internal
