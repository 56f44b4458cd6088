// Placements from hostile text, and from hostile lists: refused with a UsageError, or valid in every view.

#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "placement/table.h"
#include "tokenyard/error.h"
#include "tokenyard/placement.h"

namespace {

using tokenyard::Placement;
using tokenyard::Replica;

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const Placement& placement) {
  const Placement again = Placement::from_json(placement.to_json());
  require(again.hash() == placement.hash() && again.to_json() == placement.to_json());
  require(moves(placement, again).empty());
  for (const tokenyard::Instance& instance : placement.instances()) {
    require(instance.rank >= 0 && instance.rank < placement.ranks());
    require(placement.local_experts(instance.rank)[static_cast<std::size_t>(instance.local_index)] == instance.expert);
  }
  for (int expert = 0; expert < placement.num_experts(); ++expert) {
    const int replica = placement.replica_for(expert, placement.ranks() - 1, expert);
    require(replica >= 0 && replica < std::ssize(placement.replicas(expert)));
  }
}

// Four bytes a number, small ones likely: a count that walks off the end of the input is 0.
class Numbers {
 public:
  Numbers(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}
  bool empty() const { return at_ == end_; }
  std::uint32_t next() {
    const std::uint32_t first = byte();
    return first < 0xf0 ? first % 16 : (first << 24 | byte() << 16 | byte() << 8 | byte());
  }

 private:
  std::uint32_t byte() { return empty() ? 0 : *at_++; }
  const std::uint8_t* at_;
  const std::uint8_t* end_;
};

Placement custom_from(Numbers numbers) {
  const int ranks = static_cast<int>(numbers.next());
  std::vector<std::vector<Replica>> experts;
  while (!numbers.empty()) {
    std::vector<Replica>& replicas = experts.emplace_back();
    for (std::uint32_t count = numbers.next() % 8; count > 0; --count) {
      Replica& replica = replicas.emplace_back();
      replica.share = numbers.next();
      for (std::uint32_t shards = numbers.next() % 8; shards > 0; --shards) replica.shard_ranks.push_back(static_cast<int>(numbers.next()));
    }
  }
  return Placement::custom(ranks, experts);
}

template <class Make>
void try_to(Make&& make) {
  try {
    check(make());
  } catch (const tokenyard::UsageError&) {  // the right answer to a fault; anything else ends the program
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {  // NOLINT(readability-identifier-naming)
  try_to([&] { return Placement::from_json(std::string_view(reinterpret_cast<const char*>(data), size)); });
  try_to([&] { return custom_from(Numbers(data, size)); });
  return 0;
}
