#include <nlohmann/json.hpp>

#include "core/name_table.h"
#include "tokenyard/parallel.h"

namespace tokenyard {
namespace {

constexpr NamedValue<SubWorld> kSubWorlds[] = {
    {SubWorld::attention, "attention"}, {SubWorld::ep, "ep"}, {SubWorld::tp, "tp"}, {SubWorld::ep_tp, "ep_tp"}, {SubWorld::outer, "outer"}};

}  // namespace

std::string_view name(SubWorld kind) { return name_in(kSubWorlds, kind); }

RankCoordinates ParallelConfig::coordinates(int rank) const {
  check_parallel(*this);
  if (rank < 0 || rank >= device_count) usage_error("rank = {}; this configuration has ranks 0..{}", rank, device_count - 1);
  const int inner = rank % (ep * mlp_tp);  // within its outer replica
  return {.rank = rank,
          .node = rank / (device_count / nnodes),
          .outer = rank / (ep * mlp_tp),
          .attn_dp = inner / (attn_tp * attn_cp),
          .attn_tp = inner / attn_cp % attn_tp,
          .attn_cp = inner % attn_cp,
          .ep = inner / mlp_tp,
          .mlp_tp = inner % mlp_tp};
}

SplitArguments ParallelConfig::split_arguments(SubWorld kind, int rank) const {
  const RankCoordinates at = coordinates(rank);
  switch (kind) {
    case SubWorld::attention:
      return {.color = at.outer * attn_dp + at.attn_dp, .key = at.attn_tp * attn_cp + at.attn_cp};
    case SubWorld::ep:
      return {.color = at.outer * mlp_tp + at.mlp_tp, .key = at.ep};
    case SubWorld::tp:
      return {.color = at.outer * ep + at.ep, .key = at.mlp_tp};
    case SubWorld::ep_tp:
      return {.color = at.outer, .key = at.ep * mlp_tp + at.mlp_tp};
    case SubWorld::outer:
      return {.color = at.ep * mlp_tp + at.mlp_tp, .key = at.outer};
  }
  usage_error("sub-world {}; use one of the named kinds", static_cast<int>(kind));
}

int ParallelConfig::sub_world_size(SubWorld kind) const {
  switch (kind) {
    case SubWorld::attention:
      return attn_tp * attn_cp;
    case SubWorld::ep:
      return ep;
    case SubWorld::tp:
      return mlp_tp;
    case SubWorld::ep_tp:
      return ep * mlp_tp;
    case SubWorld::outer:
      return outer_dp;
  }
  usage_error("sub-world {}; use one of the named kinds", static_cast<int>(kind));
}

std::string ParallelConfig::to_json() const {
  nlohmann::ordered_json root = {
      {"nnodes", nnodes},     {"device_count", device_count}, {"dp", dp},           {"tp", tp},           {"ep", ep},        {"cp", cp},
      {"outer_dp", outer_dp}, {"attn_dp", attn_dp},           {"attn_tp", attn_tp}, {"attn_cp", attn_cp}, {"mlp_tp", mlp_tp}};
  root["ranks"] = nlohmann::ordered_json::array();
  for (int rank = 0; rank < device_count; ++rank) {
    const RankCoordinates at = coordinates(rank);
    root["ranks"].push_back({{"rank", at.rank},
                             {"node", at.node},
                             {"outer", at.outer},
                             {"attn_dp", at.attn_dp},
                             {"attn_tp", at.attn_tp},
                             {"attn_cp", at.attn_cp},
                             {"ep", at.ep},
                             {"mlp_tp", at.mlp_tp}});
  }
  return root.dump();
}

}  // namespace tokenyard
