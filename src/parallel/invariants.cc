#include "parallel/invariants.h"

#include <fmt/core.h>

#include "core/usage.h"

namespace tokenyard {
namespace parallel_internal {
namespace {

using Config = ParallelConfig;

std::string sizes_at_least_one(const Config& c) {
  const std::pair<const char*, int> sizes[] = {
      {"nnodes", c.nnodes}, {"device_count", c.device_count}, {"dp", c.dp},           {"tp", c.tp},           {"ep", c.ep},
      {"cp", c.cp},         {"outer_dp", c.outer_dp},         {"attn_dp", c.attn_dp}, {"attn_tp", c.attn_tp}, {"attn_cp", c.attn_cp},
      {"mlp_tp", c.mlp_tp}};
  for (const auto& [size, value] : sizes) {
    if (value < 1 || value > kMaxSize) return fmt::format("{} = {}; every size is in 1..{}", size, value, kMaxSize);
  }
  return {};
}

std::string nodes_divide_devices(const Config& c) {
  if (c.device_count % c.nnodes == 0) return {};
  return fmt::format(
      "device_count = {} is no multiple of nnodes = {}, and a node holds device_count / nnodes consecutive ranks; change one",
      c.device_count, c.nnodes);
}

std::string context_is_attention_s(const Config& c) {
  if (c.attn_cp == c.cp) return {};
  return fmt::format("attn_cp = {} is not cp = {}, and only attention has context parallelism; give one of them, or both the same",
                     c.attn_cp, c.cp);
}

std::string replicas_hold_all_data(const Config& c) {
  const std::int64_t product = std::int64_t{c.outer_dp} * c.attn_dp;
  if (product == c.dp) return {};
  return fmt::format("dp = {} is not outer_dp {} * attn_dp {} = {}; make dp a multiple of outer_dp, or leave one of the three out", c.dp,
                     c.outer_dp, c.attn_dp, product);
}

std::string attention_uses_all_devices(const Config& c) {
  const std::int64_t without_tp = std::int64_t{c.outer_dp} * c.attn_dp * c.attn_cp;
  if (without_tp * c.attn_tp == c.device_count) return {};
  return fmt::format(
      "device_count = {} is not outer_dp {} * attn_dp {} * attn_tp {} * attn_cp {} = {}; make it a multiple of dp * cp = {}, or change dp, "
      "cp or tp",
      c.device_count, c.outer_dp, c.attn_dp, c.attn_tp, c.attn_cp, without_tp * c.attn_tp, without_tp);
}

std::string experts_use_all_devices(const Config& c) {
  const std::int64_t without_tp = std::int64_t{c.outer_dp} * c.ep;
  if (without_tp * c.mlp_tp == c.device_count) return {};
  return fmt::format(
      "device_count = {} is not outer_dp {} * ep {} * mlp_tp {} = {}; make it a multiple of outer_dp * ep = {} (raise dp or tp, or leave "
      "tp "
      "out), or change ep",
      c.device_count, c.outer_dp, c.ep, c.mlp_tp, without_tp * c.mlp_tp, without_tp);
}

std::string tp_holds_attention(const Config& c) {
  if (c.tp % c.attn_tp == 0) return {};
  return fmt::format(
      "tp = {} is no multiple of attn_tp = {} (of {} devices, dp {} * cp {} leaves so many to attention); use tp {}, more dp or fewer "
      "devices, or leave tp out",
      c.tp, c.attn_tp, c.device_count, c.dp, c.cp, c.attn_tp);
}

std::string tp_holds_experts(const Config& c) {
  if (c.tp % c.mlp_tp == 0) return {};
  return fmt::format(
      "tp = {} is no multiple of mlp_tp = {} (of {} devices, outer_dp {} * ep {} leaves so many to an expert); use tp {}, more ep or fewer "
      "devices, or leave tp out",
      c.tp, c.mlp_tp, c.device_count, c.outer_dp, c.ep, c.mlp_tp);
}

std::string tp_is_one_of_both(const Config& c) {
  if (c.attn_tp == c.tp || c.mlp_tp == c.tp) return {};
  return fmt::format("tp = {} is neither attn_tp = {} nor mlp_tp = {}, and one of them equals it; lower tp, or choose a cp that divides ep",
                     c.tp, c.attn_tp, c.mlp_tp);
}

}  // namespace

std::optional<Broken> first_broken(const ParallelConfig& config) {
  constexpr std::string (*kInvariants[])(const Config&) = {sizes_at_least_one,     nodes_divide_devices,       context_is_attention_s,
                                                           replicas_hold_all_data, attention_uses_all_devices, experts_use_all_devices,
                                                           tp_holds_attention,     tp_holds_experts,           tp_is_one_of_both};
  int index = 0;
  for (const auto invariant : kInvariants) {
    std::string text = invariant(config);
    if (!text.empty()) return Broken{index, std::move(text)};
    ++index;
  }
  return std::nullopt;
}

}  // namespace parallel_internal

void check_parallel(const ParallelConfig& config) {
  if (const auto broken = parallel_internal::first_broken(config)) usage_error("{}", broken->text);
}

}  // namespace tokenyard
