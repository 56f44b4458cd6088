#include <algorithm>
#include <cstring>

#include "core/usage.h"
#include "tokenyard/weights.h"

namespace tokenyard {
namespace {

// Elements [begin, end) of the full tensor, and where they are.
struct Stretch {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  int rank = 0;
  std::int64_t local_offset = 0;
};

std::vector<Stretch> stretches_of(const ShardMap& map, int rank) {
  std::vector<Stretch> result;
  for (const Run& run : map.runs()) result.push_back({run.global_offset, run.global_offset + run.length, rank, run.local_offset});
  std::sort(result.begin(), result.end(), [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; });
  return result;
}

// Adds what `added` covers and `covered` does not. Both are sorted and without overlap, and so is the result.
std::vector<Stretch> merged(const std::vector<Stretch>& covered, const std::vector<Stretch>& added) {
  std::vector<Stretch> result;
  auto next = covered.begin();
  for (Stretch rest : added) {
    while (rest.begin < rest.end) {
      while (next != covered.end() && next->end <= rest.begin) result.push_back(*next++);
      const bool is_covered = next != covered.end() && next->begin <= rest.begin;
      const std::int64_t stop = next == covered.end() ? rest.end : std::min(rest.end, is_covered ? next->end : next->begin);
      if (!is_covered) result.push_back({rest.begin, stop, rest.rank, rest.local_offset});
      rest.local_offset += stop - rest.begin;
      rest.begin = stop;
    }
  }
  result.insert(result.end(), next, covered.end());
  return result;
}

// The stretch that holds element `at`, or else the first one behind it, or the end.
auto find_stretch(const std::vector<Stretch>& stretches, std::int64_t at) {
  return std::upper_bound(stretches.begin(), stretches.end(), at, [](std::int64_t x, const Stretch& stretch) { return x < stretch.end; });
}

void check_sizes(std::span<const ShardMap> from, std::span<const ShardMap> to) {
  if (from.size() != to.size() || from.empty()) {
    usage_error("{} shards become {}; give one map per rank on both sides (an empty one for a rank without elements)", from.size(),
                to.size());
  }
  for (const auto& maps : {from, to}) {
    for (const ShardMap& map : maps) {
      if (map.global_elements() != from[0].global_elements()) {
        usage_error("shards of tensors of {} and {} elements; all maps are of one full tensor", from[0].global_elements(),
                    map.global_elements());
      }
    }
  }
}

void plan_rank(const std::vector<Stretch>& own, const std::vector<Stretch>& lowest, const ShardMap& wanted, int to_rank,
               std::vector<Transfer>& plan) {
  for (const Run& run : wanted.runs()) {
    const std::int64_t end = run.global_offset + run.length;
    for (std::int64_t at = run.global_offset; at < end;) {
      const auto mine = find_stretch(own, at);
      const bool is_mine = mine != own.end() && mine->begin <= at;
      const auto source = is_mine ? mine : find_stretch(lowest, at);
      if (!is_mine && (source == lowest.end() || source->begin > at)) {
        usage_error("no rank holds element {}, which rank {} is to get; the old shards have to cover the tensor", at, to_rank);
      }
      std::int64_t stop = std::min(end, source->end);
      if (!is_mine && mine != own.end()) stop = std::min(stop, mine->begin);
      plan.push_back(
          {source->rank, source->local_offset + at - source->begin, to_rank, run.local_offset + at - run.global_offset, stop - at});
      at = stop;
    }
  }
}

void check_dense(const char* what, const ConstTensorView& view, std::int64_t elements) {
  const bool dense = view.rows_contiguous() && (view.shape[0] <= 1 || view.strides[0] * view.shape[0] == view.num_elements());
  if (!view || view.num_elements() != elements || !dense) {
    usage_error("{} is {}; expected the {} elements of this rank's shard, dense", what, describe(view), elements);
  }
}

// What one rank sends and receives, in the order in which pieces lie in the buffers: by peer, then by place at the receiver.
struct Traffic {
  std::vector<Transfer> sent;
  std::vector<Transfer> received;
  std::vector<std::int64_t> send_bytes;
  std::vector<std::int64_t> receive_bytes;
};

Traffic traffic_of(const std::vector<Transfer>& plan, int rank, int size, std::int64_t element_bytes) {
  Traffic traffic;
  traffic.send_bytes.resize(static_cast<std::size_t>(size));
  traffic.receive_bytes.resize(static_cast<std::size_t>(size));
  for (const Transfer& piece : plan) {  // ordered by receiver
    if (piece.from_rank == rank) {
      traffic.sent.push_back(piece);
      traffic.send_bytes[piece.to_rank] += piece.length * element_bytes;
    }
    if (piece.to_rank == rank) {
      traffic.received.push_back(piece);
      traffic.receive_bytes[piece.from_rank] += piece.length * element_bytes;
    }
  }
  std::stable_sort(traffic.received.begin(), traffic.received.end(),
                   [](const Transfer& a, const Transfer& b) { return a.from_rank < b.from_rank; });
  return traffic;
}

}  // namespace

std::vector<Transfer> reshard_plan(std::span<const ShardMap> from, std::span<const ShardMap> to) {
  check_sizes(from, to);
  std::vector<Stretch> lowest;
  for (int rank = 0; rank < std::ssize(from); ++rank) lowest = merged(lowest, stretches_of(from[rank], rank));
  std::vector<Transfer> plan;
  for (int rank = 0; rank < std::ssize(to); ++rank) {
    plan_rank(stretches_of(from[rank], rank), lowest, to[rank], rank, plan);
  }
  return plan;
}

void reshard(Collectives& collectives, std::span<const ShardMap> from, std::span<const ShardMap> to, const ConstTensorView& in,
             const TensorView& out) {
  const int rank = collectives.world().rank();
  const int size = collectives.world().size();
  if (std::ssize(from) != size) usage_error("{} shards and {} ranks; give one map per rank", from.size(), size);
  const std::vector<Transfer> plan = reshard_plan(from, to);
  check_dense("in", in, from[rank].local_elements());
  check_dense("out", out, to[rank].local_elements());
  if (in.dtype != out.dtype) usage_error("in is {} and out {}; resharding moves bits: use one dtype", name(in.dtype), name(out.dtype));
  const std::int64_t element_bytes = size_of(in.dtype);
  const Traffic traffic = traffic_of(plan, rank, size, element_bytes);
  const auto total = [](const std::vector<std::int64_t>& bytes) {
    std::int64_t sum = 0;
    for (const std::int64_t count : bytes) sum += count;
    return sum;
  };
  std::vector<std::byte> send(static_cast<std::size_t>(total(traffic.send_bytes)));
  std::vector<std::byte> receive(static_cast<std::size_t>(total(traffic.receive_bytes)));
  std::byte* packed = send.data();
  for (const Transfer& piece : traffic.sent) {
    const auto bytes = static_cast<std::size_t>(piece.length * element_bytes);
    std::memcpy(packed, in.as<std::byte>() + piece.from_offset * element_bytes, bytes);
    packed += bytes;
  }
  collectives.all_to_all_v({send.data(), Dtype::uint8, {std::ssize(send)}}, traffic.send_bytes,
                           {receive.data(), Dtype::uint8, {std::ssize(receive)}}, traffic.receive_bytes);
  const std::byte* arrived = receive.data();
  for (const Transfer& piece : traffic.received) {
    const auto bytes = static_cast<std::size_t>(piece.length * element_bytes);
    std::memcpy(out.as<std::byte>() + piece.to_offset * element_bytes, arrived, bytes);
    arrived += bytes;
  }
}

void gather_full(Collectives& collectives, std::span<const ShardMap> maps, const ConstTensorView& in, int root, const TensorView& out) {
  const int rank = collectives.world().rank();
  if (root < 0 || root >= std::ssize(maps)) usage_error("root = {}; it is a rank in 0..{}", root, std::ssize(maps) - 1);
  const std::int64_t elements = maps[0].global_elements();
  std::vector<ShardMap> to(maps.size(), ShardMap::of_ranges(elements, {}));
  to[root] = ShardMap::whole(elements);
  reshard(collectives, maps, to, in, rank == root ? out : TensorView(nullptr, in.dtype, {0}));
}

}  // namespace tokenyard
