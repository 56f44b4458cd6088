#pragma once
// What each rank brings to the creation of symmetric memory, told to all before anybody relies on it.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/deadline.h"
#include "core/expected.h"
#include "memory/fd_exchange.h"
#include "tokenyard/options.h"
#include "tokenyard/world.h"

namespace tokenyard {

struct Offer {
  std::uint64_t bytes = 0;
  Transport transport = Transport::automatic;
  std::string error{};  // why this rank cannot
  FdExchange::Endpoint endpoint{};
  std::string extra{};             // what only ranks of this transport understand
  std::shared_ptr<void> object{};  // reaches rank threads of this process only
};

// Collective: all ranks learn whether all ranks can, and want the same. The failure names a rank that cannot, or differs.
Expected<std::vector<Offer>> agree_on_offers(const World& world, const Offer& mine, Deadline deadline);

// Of this world, the lowest rank whose memory this rank cannot address; -1 when there is none.
int first_peer_without_memory(const World& world);

}  // namespace tokenyard
