// Replicas for hot experts, and an even packing of all of them: the two steps of DeepSeek's expert-parallel load
// balancer (EPLB), with the packing improved by swaps.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <queue>

#include "core/usage.h"
#include "placement/build.h"

namespace tokenyard {
namespace {

// One copy of an expert, with its share of the expert's load.
struct Copy {
  int expert = 0;
  double load = 0;
};

// What copies are packed into: a node of `width` ranks, or one rank (width 1).
struct Bin {
  int first_rank = 0;
  int width = 1;
  double load = 0;
  std::vector<Copy> copies;

  double load_per_rank() const { return load / width; }
  // Whether a further copy of `expert` finds a rank here that does not hold one yet.
  bool has_room_for(int expert) const {
    return std::count_if(copies.begin(), copies.end(), [expert](const Copy& copy) { return copy.expert == expert; }) < width;
  }
  void add(const Copy& copy) {
    copies.push_back(copy);
    load += copy.load;
  }
};

void check_arguments(int num_experts, int ranks, std::span<const double> load, int redundant, int ranks_per_node) {
  placement_internal::check_sizes(num_experts, ranks);
  if (std::ssize(load) != num_experts) {
    usage_error("load has {} entries; it needs one for each of num_experts = {}", load.size(), num_experts);
  }
  for (int expert = 0; expert < num_experts; ++expert) {
    if (!std::isfinite(load[expert]) || load[expert] < 0) {
      usage_error("load[{}] = {}; a load is finite and not negative", expert, load[expert]);
    }
  }
  const std::int64_t most = static_cast<std::int64_t>(num_experts) * (ranks - 1);
  if (redundant < 0 || redundant > most) {
    usage_error("redundant = {}; with {} experts on {} ranks, at most one copy of an expert per rank, it is in 0..{}", redundant,
                num_experts, ranks, most);
  }
  if (ranks_per_node < 0 || (ranks_per_node > 0 && ranks % ranks_per_node != 0)) {
    usage_error("ranks_per_node = {}; with ranks = {} it is a divisor of that, or 0 for one node", ranks_per_node, ranks);
  }
}

// Gives each further copy to the expert whose copies carry the most; ties to the fewest copies, then to the lower id.
std::vector<int> count_copies(std::span<const double> load, int ranks, int redundant) {
  struct Candidate {
    double load_per_copy;
    int copies;
    int expert;
    bool operator<(const Candidate& other) const {  // the greatest is served first
      if (load_per_copy != other.load_per_copy) return load_per_copy < other.load_per_copy;
      return copies != other.copies ? copies > other.copies : expert > other.expert;
    }
  };
  std::vector<int> copies(load.size(), 1);
  std::priority_queue<Candidate> queue;
  const auto push = [&](int expert) {
    if (copies[expert] < ranks) queue.push({load[expert] / copies[expert], copies[expert], expert});
  };
  for (int expert = 0; expert < std::ssize(load); ++expert) push(expert);
  for (; redundant > 0; --redundant) {
    const int expert = queue.top().expert;
    queue.pop();
    ++copies[expert];
    push(expert);
  }
  return copies;
}

// Heaviest first; the copies of one expert lie next to each other.
void sort_copies(std::vector<Copy>& copies) {
  std::sort(copies.begin(), copies.end(),
            [](const Copy& a, const Copy& b) { return a.load != b.load ? a.load > b.load : a.expert < b.expert; });
}

// Deals the sorted copies in rounds: in each, every bin takes `width` copies, the heaviest going to the least loaded bin.
// Rounds keep the counts per rank within one of each other, and there is always room: an expert has at most one copy per
// rank in all, so a round that continues its copies finds as many bins without it as there are copies left.
void deal(const std::vector<Copy>& sorted, std::vector<Bin>& bins) {
  std::vector<int> quota(bins.size(), 0);
  for (const Copy& copy : sorted) {
    if (std::all_of(quota.begin(), quota.end(), [](int left) { return left == 0; })) {
      std::transform(bins.begin(), bins.end(), quota.begin(), [](const Bin& bin) { return bin.width; });
    }
    int best = -1;
    for (int b = 0; b < std::ssize(bins); ++b) {
      if (quota[b] == 0 || (best >= 0 && bins[b].load_per_rank() >= bins[best].load_per_rank())) continue;
      if (bins[b].has_room_for(copy.expert)) best = b;
    }
    TY_ASSERT(best >= 0);
    bins[best].add(copy);
    --quota[best];
  }
}

// Exchange of copy `give` of the fullest bin for copy `take` of bin `other` (kNothing: for none).
struct Swap {
  static constexpr int kNothing = -1;
  int other = -1;
  int give = 0;
  int take = kNothing;
  double peak = 0;  // the higher load per rank of the two bins afterwards
};

class Balancer {
 public:
  // `fewest`..`most`: copies per rank that moves of single copies must respect.
  Balancer(std::vector<Bin>& bins, std::int64_t fewest, std::int64_t most) : bins_(bins), fewest_(fewest), most_(most) {}

  // Takes the swap that helps most between the fullest bin and any other, until none helps.
  void run() {
    while (evaluated_ < kMaxEvaluated) {
      const auto fullest =
          std::max_element(bins_.begin(), bins_.end(), [](const Bin& a, const Bin& b) { return a.load_per_rank() < b.load_per_rank(); });
      const Swap swap = best_swap(*fullest);
      if (swap.other < 0) return;
      apply(*fullest, swap);
    }
  }

 private:
  // A budget of work instead of time, so that every machine stops at the same place: about a second.
  static constexpr std::int64_t kMaxEvaluated = std::int64_t{1} << 26;

  Swap best_swap(const Bin& full) {
    Swap best;
    best.peak = full.load_per_rank() * (1 - 1e-9);  // rounding is not progress
    for (int other = 0; other < std::ssize(bins_); ++other) {
      const Bin& bin = bins_[other];
      if (&bin == &full || bin.load_per_rank() >= best.peak) continue;
      const bool may_move = std::ssize(full.copies) > fewest_ * full.width && std::ssize(bin.copies) < most_ * bin.width;
      for (int give = 0; give < std::ssize(full.copies); ++give) {
        for (int take = may_move ? Swap::kNothing : 0; take < std::ssize(bin.copies); ++take) consider(full, {other, give, take}, best);
      }
    }
    return best;
  }

  void consider(const Bin& full, Swap swap, Swap& best) {
    ++evaluated_;
    const Bin& bin = bins_[swap.other];
    const Copy& given = full.copies[swap.give];
    const Copy taken = swap.take == Swap::kNothing ? Copy{-1, 0} : bin.copies[swap.take];
    const double shift = given.load - taken.load;
    swap.peak = std::max((full.load - shift) / full.width, (bin.load + shift) / bin.width);
    if (swap.peak >= best.peak || given.expert == taken.expert || !bin.has_room_for(given.expert)) return;
    if (swap.take != Swap::kNothing && !full.has_room_for(taken.expert)) return;
    best = swap;
  }

  void apply(Bin& full, const Swap& swap) {
    Bin& bin = bins_[swap.other];
    if (swap.take == Swap::kNothing) {
      bin.copies.push_back(full.copies[swap.give]);
      full.copies.erase(full.copies.begin() + swap.give);
    } else {
      std::swap(full.copies[swap.give], bin.copies[swap.take]);
    }
    for (Bin* changed : {&full, &bin}) {  // summed anew: no drift
      changed->load = 0;
      for (const Copy& copy : changed->copies) changed->load += copy.load;
    }
  }

  std::vector<Bin>& bins_;
  std::int64_t fewest_;
  std::int64_t most_;
  std::int64_t evaluated_ = 0;
};

// Splits `ranks` ranks from first_rank into bins of `width` and packs the copies into them.
std::vector<Bin> pack(std::vector<Copy> copies, int first_rank, int ranks, int width) {
  std::vector<Bin> bins;
  for (int rank = first_rank; rank < first_rank + ranks; rank += width) bins.push_back({rank, width, 0, {}});
  const auto count = std::ssize(copies);
  sort_copies(copies);
  deal(copies, bins);
  Balancer(bins, count / ranks, (count + ranks - 1) / ranks).run();
  return bins;
}

}  // namespace

Placement Placement::replicated(int num_experts, int ranks, std::span<const double> load, int redundant, const ReplicatedOptions& options) {
  check_arguments(num_experts, ranks, load, redundant, options.ranks_per_node);
  const std::vector<int> counts = count_copies(load, ranks, redundant);
  std::vector<Copy> copies;
  for (int expert = 0; expert < num_experts; ++expert) copies.insert(copies.end(), counts[expert], {expert, load[expert] / counts[expert]});

  std::vector<std::vector<Replica>> replicas(static_cast<std::size_t>(num_experts));
  const int node_width = options.ranks_per_node == 0 ? ranks : options.ranks_per_node;
  for (Bin& node : pack(std::move(copies), 0, ranks, node_width)) {
    for (const Bin& rank : pack(std::move(node.copies), node.first_rank, node.width, 1)) {
      for (const Copy& copy : rank.copies) replicas[copy.expert].push_back({{rank.first_rank}, 1});
    }
  }
  return custom(ranks, replicas);  // nodes and ranks ascend, so the replicas of an expert are ordered by rank
}

}  // namespace tokenyard
