#pragma once
// What this machine and this build can do, with the reason and the remedy where something is missing.

#include <string>
#include <vector>

#include "tokenyard/world.h"

namespace tokenyard {

enum class Availability : std::uint8_t { available, not_built, not_usable };
std::string_view name(Availability availability);

struct Backend {
  std::string name;  // "inproc", "shm", "cuda_peer", "mpi", ...
  std::string kind;  // "memory", "collective", "port"
  Availability availability = Availability::available;
  std::string reason{};  // empty when available
  std::string remedy{};
};
std::vector<Backend> backends();

struct Topology {
  int ranks = 0;
  std::vector<std::string> hosts;            // [R]
  std::vector<std::vector<LinkKind>> links;  // [R][R]
};
Topology topology(const World& world);

}  // namespace tokenyard
