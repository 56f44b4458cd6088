#pragma once
// SIGINT and SIGTERM of the launcher reach its ranks.

#include <sys/types.h>

#include "world/fd.h"

namespace tokenyard::world_internal {

// While relays exist, these signals no longer end this process but go to the relays' process groups (where the process
// ignored a signal, it still does). Several may exist, in different threads.
class SignalRelay {
 public:
  SignalRelay();
  ~SignalRelay();
  SignalRelay(const SignalRelay&) = delete;
  SignalRelay& operator=(const SignalRelay&) = delete;
  // 0: no group, any more.
  void set_group(pid_t group);
  // Becomes readable when a signal was relayed.
  int fd() const { return event_.get(); }

 private:
  Fd event_;
  int slot_;
};

}  // namespace tokenyard::world_internal
