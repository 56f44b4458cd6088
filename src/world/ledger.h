#pragma once
// The book-keeping of a store: which gathers are open, who arrived, who is gone. A state machine without threads, sockets
// or clocks; LocalStore and the TCP server both keep one.

#include <chrono>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/deadline.h"
#include "world/store.h"

namespace tokenyard::world_internal {

class Ledger {
 public:
  using Outcome = Expected<Gathered>;
  // Both are called from inside the member functions below, and must not call back: once for every arrival, and once for
  // every rank that is lost.
  using Deliver = std::function<void(int rank, GatherKey key, const Outcome& outcome)>;
  using Announce = std::function<void(int lost_rank)>;

  Ledger(int size, Deliver deliver, Announce announce);

  // The rank's part of a gather. All members get the outcome once all have arrived, or a failure as soon as one member is
  // gone, made another call, or ran out of time. Returns why a malformed call is refused.
  std::optional<std::string> arrive(int rank, const Call& call, SharedPart part, Deadline deadline);
  // The rank died, or gave up: gathers that include it fail. Returns false when it was gone before.
  bool lose(int rank, std::string reason);
  // The rank needs the store no more; gathers that include it fail, but it is not lost.
  bool close(int rank);
  // Fails the gathers whose deadline has passed. A meeting of survivors (Phase::recover) does not fail: who has not come is lost.
  void expire(Deadline::Clock::time_point now);
  std::optional<Deadline::Clock::time_point> next_deadline() const;

  bool lost(int rank) const { return ranks_[rank].presence == Presence::lost; }
  int size() const { return static_cast<int>(ranks_.size()); }
  std::size_t open_gathers() const { return entries_.size(); }

 private:
  enum class Presence { here, closed, lost };
  struct Rank {
    Presence presence = Presence::here;
    std::string reason;
  };
  struct Seat {
    int rank;
    SharedPart part;
    bool arrived = false;
  };
  struct Entry {
    Phase phase;
    Deadline deadline;        // the earliest
    int hurried = 0;          // the seat that has it
    std::vector<Seat> seats;  // of the members, in their order
    int arrived = 0;
    std::optional<Failure> failure;  // kept for the members that have not arrived yet
  };
  // By key and members: a rank reaches no gather that it is no member of, whatever key it says.
  using Entries = std::map<std::pair<GatherKey, std::vector<int>>, Entry>;

  std::optional<std::string> malformed(int rank, const Call& call, const SharedPart& part) const;
  void settle(Entries::iterator at);
  void complete(Entries::iterator at);
  void fail(Entries::iterator at, Failure failure);
  std::optional<Failure> gone_member(const Entry& entry) const;
  bool depart(int rank, Presence presence, std::string reason);
  bool awaited(const Entry& entry) const;
  Failure gone_itself(int rank, int seat, Phase phase) const;

  Deliver deliver_;
  Announce announce_;
  std::vector<Rank> ranks_;
  Entries entries_;
  std::uint64_t next_serial_ = kRootGeneration + 1;
};

// "rank 3", "ranks 1, 3", "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more".
std::string list_ranks(const std::vector<int>& ranks);

}  // namespace tokenyard::world_internal
