#pragma once
// The store: where ranks meet. Its one collective primitive is a gather of small control data.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "core/deadline.h"
#include "core/expected.h"

namespace tokenyard::world_internal {

inline constexpr std::size_t kMaxPartBytes = (std::size_t{16} << 20) - 1;  // of one rank, in one gather
inline constexpr int kMaxWorldSize = 1 << 16;
inline constexpr std::uint64_t kRootGeneration = 1;

// Names one collective call: `sequence` counts the calls of the world `generation`.
struct GatherKey {
  std::uint64_t generation = 0;
  std::uint64_t sequence = 0;
  auto operator<=>(const GatherKey&) const = default;
};

// What one rank gives. `object` reaches rank threads of the same process only, and keeps what it points to alive.
struct Part {
  std::vector<std::byte> bytes;
  std::shared_ptr<void> object;
};
using SharedPart = std::shared_ptr<const Part>;

struct Call {
  GatherKey key;
  Phase phase = Phase::gather;  // ranks in different phases made different calls
  std::vector<int> members;     // store ranks of the world, in its order
};

struct Gathered {
  std::uint64_t serial = 0;       // serial, ..., serial + members - 1 were never given to another gather of this store
  std::vector<SharedPart> parts;  // of all members in order; in Phase::recover of those that are left
};

// The survivors of a world may have made different numbers of calls before one of them failed: they meet under a number of their own.
inline constexpr std::uint64_t kRecoverSequence = ~std::uint64_t{0};

// One rank's access to the store. Threads may use it at once, for different worlds. Destroying it says that this rank
// takes part in nothing any more.
class Store {
 public:
  virtual ~Store() = default;
  // Collective over call.members. Ranks in the failure are indices of call.members.
  virtual Expected<Gathered> gather(const Call& call, SharedPart mine, Deadline deadline) = 0;
  // Whether the rank was reported as lost. Never blocks.
  virtual bool lost(int rank) const = 0;
  // Reports this rank as lost.
  virtual void give_up(std::string_view reason) = 0;
};

}  // namespace tokenyard::world_internal
