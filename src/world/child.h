#pragma once
// Starting one rank's process.

#include <sys/types.h>

#include <string>
#include <vector>

#include "core/expected.h"
#include "world/fd.h"

namespace tokenyard::world_internal {

struct ChildOptions {
  std::vector<std::string> argv;
  std::vector<std::string> environment;  // "NAME=value", all of it
  pid_t group = 0;                       // of processes to join; 0: lead a new one
  int out = -1;                          // where its stdout goes; -1: where ours does
  int err = -1;
};

struct Child {
  pid_t pid = 0;
  Fd pidfd;  // readable once it has ended
};

// stdin is empty. The kernel kills the child when the calling thread ends, so that it cannot outlive a killed launcher.
Expected<Child> spawn(const ChildOptions& options);

}  // namespace tokenyard::world_internal
