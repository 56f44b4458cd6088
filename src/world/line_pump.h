#pragma once
// Output of a rank, line by line, with its name in front.

#include <string>

#include "world/fd.h"

namespace tokenyard::world_internal {

class LinePump {
 public:
  // Whole lines read from `from` are written to the descriptor `to`, each with `prefix`.
  LinePump(Fd from, int to, std::string prefix) : from_(std::move(from)), to_(to), prefix_(std::move(prefix)) {}
  // -1 once the output has ended.
  int fd() const { return from_.get(); }
  // Moves what is there. Never waits for input.
  void pump();
  // Moves what is there, a last line without its end included.
  void finish();

 private:
  void take(std::string_view text, std::string& out);

  Fd from_;
  int to_;
  std::string prefix_;
  std::string line_;  // begun, not ended
};

}  // namespace tokenyard::world_internal
