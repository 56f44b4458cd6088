#pragma once
// A communicator of NCCL: how the ranks of a world come to one, and how its work is waited for: with a deadline, and an eye on ranks
// that are lost.

#include <functional>
#include <string>

#include "core/deadline.h"
#include "core/expected.h"
#include "tokenyard/world.h"
#include "world/nccl.h"

namespace tokenyard::nccl {

// Collective, before NCCL is asked for anything: all ranks learn whether all can, so that none waits for one that cannot. `objection`:
// why this rank cannot, or empty. The id of their communicator, unless one is `given`. UsageError: this rank cannot, or two ranks have
// one GPU; TransportError: another rank cannot.
UniqueId agree(const World& world, int device, std::string objection, Phase phase, Comm given = nullptr);

class Communicator {
 public:
  struct Options {
    int device = 0;
    bool blocking = false;  // calls launch from the calling thread; then nothing but a wait has a deadline
    Phase phase = Phase::collective;
    int timeout_ms = 0;
  };
  // Collective. Throws TransportError.
  Communicator(const World& world, const UniqueId& id, const Options& options);
  // The caller's, who keeps it.
  Communicator(const World& world, Comm given, const Options& options);
  // Local: aborting waits for nobody. What is wanted done, has been waited for.
  ~Communicator() { abort(); }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  Comm get() const { return comm_; }
  bool is_given() const { return is_given_; }
  const Library& library() const { return library_; }

  // Behind it what was called, with this result, is done or enqueued: NCCL's own thread may still be at it.
  Expected<void> settle(const char* what, Result result);
  Expected<void> wait_until(const std::function<bool()>& done);

 private:
  // A failure is the communicator's end, unless it is the caller's.
  void abort();
  tl::unexpected<Failure> give_up(FailureKind kind, int peer, std::string detail);
  Expected<void> look_around(const Deadline& deadline);

  World world_;
  Options options_;
  const Library& library_;
  Comm comm_ = nullptr;
  bool is_given_ = false;
};

}  // namespace tokenyard::nccl
