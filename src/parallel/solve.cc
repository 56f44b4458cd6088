// The search. Every valid configuration has tp = attn_tp, hence device_count = dp * cp * tp, or tp = mlp_tp, hence device_count =
// outer_dp * ep * tp; and in both cases device_count divides dp * tp * gcd(cp, ep). So few device counts need a look.

#include <algorithm>
#include <functional>
#include <numeric>

#include "core/usage.h"
#include "parallel/invariants.h"

namespace tokenyard {
namespace {

using parallel_internal::Broken;
using parallel_internal::kMaxSize;

void check_given(const ParallelRequest& request) {
  const std::pair<const char*, std::optional<int>> given[] = {{"nnodes", request.nnodes},
                                                              {"device_count", request.device_count},
                                                              {"dp", request.dp},
                                                              {"tp", request.tp},
                                                              {"ep", request.ep},
                                                              {"cp", request.cp},
                                                              {"outer_dp", request.outer_dp},
                                                              {"attn_dp", request.attn_dp},
                                                              {"attn_tp", request.attn_tp},
                                                              {"attn_cp", request.attn_cp},
                                                              {"mlp_tp", request.mlp_tp}};
  for (const auto& [size, value] : given) {
    if (value && (*value < 1 || *value > kMaxSize)) usage_error("{} = {}; every size is in 1..{}", size, *value, kMaxSize);
  }
  const Transport transport = request.transport;
  const bool stays = transport == Transport::inproc || transport == Transport::shm || transport == Transport::cuda_peer;
  if (stays && request.nnodes > 1) {
    usage_error("transport {} does not leave a host, and nnodes = {}; use nnodes 1, or transport automatic or mpi", name(transport),
                request.nnodes);
  }
}

class Search {
 public:
  explicit Search(const ParallelRequest& request) : request_(request) {
    base_.nnodes = request.nnodes;
    base_.ep = request.ep.value_or(1);
    base_.cp = request.cp.value_or(request.attn_cp.value_or(1));
    base_.attn_cp = request.attn_cp.value_or(base_.cp);
    const std::int64_t dp = std::int64_t{request.outer_dp.value_or(1)} * request.attn_dp.value_or(1);
    if (!request.dp && dp > kMaxSize) usage_error("outer_dp * attn_dp = {}; every size is in 1..{}", dp, kMaxSize);
    base_.dp = request.dp.value_or(static_cast<int>(dp));
    list_outer();
  }

  ParallelConfig run() {
    const int last_tp = request_.tp.value_or(most_tp());
    for (int tp = request_.tp.value_or(1); tp <= last_tp; ++tp) {
      for (const std::int64_t device_count : device_counts(tp)) {
        for (const int outer_dp : outer_) {
          const ParallelConfig config = filled(tp, static_cast<int>(device_count), outer_dp);
          std::optional<Broken> broken = parallel_internal::first_broken(config);
          if (!broken) return config;
          if (!closest_ || broken->index > closest_->index) closest_ = std::move(broken);
        }
      }
    }
    if (!closest_) {
      usage_error("dp = {} * cp = {} with tp = {} and ep = {} needs more than {} devices; lower one", base_.dp, base_.cp,
                  request_.tp.value_or(1), base_.ep, kMaxSize);
    }
    const char* derived = request_.device_count ? "" : " (device_count was left out: it divides dp * tp * gcd(cp, ep))";
    usage_error("{}{}", closest_->text, derived);
  }

 private:
  // No smallest tp is larger: with neither attn_tp nor mlp_tp given, tp = nnodes times the larger of ep and attn_dp * cp works if any does
  // (one of the two divides the other). With one of them given, the devices are bounded, and tp with them.
  int most_tp() const {
    if (request_.device_count) return *request_.device_count;
    std::int64_t most = std::int64_t{base_.nnodes} * std::max<std::int64_t>(base_.ep, std::int64_t{base_.dp} * base_.cp);
    if (request_.mlp_tp) most = std::int64_t{base_.dp} * base_.ep * *request_.mlp_tp;
    if (request_.attn_tp) most = std::int64_t{base_.dp} * base_.cp * *request_.attn_tp;
    return static_cast<int>(std::min<std::int64_t>(most, kMaxSize));
  }

  // Ascending.
  void list_outer() {
    if (request_.outer_dp || request_.attn_dp) {
      outer_ = {request_.outer_dp.value_or(std::max(1, base_.dp / request_.attn_dp.value_or(1)))};
      return;
    }
    for (int outer_dp = 1; outer_dp <= base_.dp; ++outer_dp) {
      if (base_.dp % outer_dp == 0) outer_.push_back(outer_dp);
    }
  }

  // Descending.
  std::vector<std::int64_t> device_counts(int tp) const {
    if (request_.device_count) return {*request_.device_count};
    const std::int64_t bound = std::int64_t{base_.dp} * tp * std::gcd(base_.cp, base_.ep);
    std::vector<std::int64_t> counts = {bound, std::int64_t{base_.dp} * base_.cp * tp};
    for (const int outer_dp : outer_) counts.push_back(std::int64_t{outer_dp} * base_.ep * tp);
    std::erase_if(counts, [bound](std::int64_t count) { return bound % count != 0 || count > kMaxSize; });
    std::sort(counts.begin(), counts.end(), std::greater<>());
    counts.erase(std::unique(counts.begin(), counts.end()), counts.end());
    return counts;
  }

  // What is left out is what the division leaves, rounded down: where there is a rest, an invariant is broken and says so.
  ParallelConfig filled(int tp, int device_count, int outer_dp) const {
    ParallelConfig config = base_;
    const auto part = [](std::int64_t whole, std::int64_t parts) { return static_cast<int>(std::max<std::int64_t>(1, whole / parts)); };
    config.tp = tp;
    config.device_count = device_count;
    config.outer_dp = outer_dp;
    config.attn_dp = request_.attn_dp.value_or(part(config.dp, outer_dp));
    config.attn_tp = request_.attn_tp.value_or(part(device_count, std::int64_t{outer_dp} * config.attn_dp * config.attn_cp));
    config.mlp_tp = request_.mlp_tp.value_or(part(device_count, std::int64_t{outer_dp} * config.ep));
    return config;
  }

  const ParallelRequest& request_;
  ParallelConfig base_;
  std::vector<int> outer_;
  std::optional<Broken> closest_;
};

}  // namespace

ParallelConfig solve_parallel(const ParallelRequest& request) {
  check_given(request);
  return Search(request).run();
}

}  // namespace tokenyard
