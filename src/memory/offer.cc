#include "memory/offer.h"

#include <fmt/format.h>

#include <algorithm>

#include "world/bytes.h"
#include "world/state.h"

namespace tokenyard {
namespace {

using world_internal::ByteReader;
using world_internal::ByteWriter;
using world_internal::Part;
using world_internal::SharedPart;

Part encode(const Offer& offer) {
  ByteWriter out;
  out.put(offer.bytes);
  out.put(static_cast<std::uint8_t>(offer.transport));
  out.put_text(offer.error);
  out.put_text(offer.endpoint.address);
  out.put_text(offer.endpoint.secret);
  out.put_text(offer.extra);
  return {.bytes = out.take(), .object = offer.object};
}

Offer decode(const Part& part) {
  ByteReader in(part.bytes);
  Offer offer;
  offer.bytes = in.get<std::uint64_t>();
  const auto transport = in.get<std::uint8_t>();
  offer.error = in.get_text();
  offer.endpoint.address = in.get_text();
  offer.endpoint.secret = in.get_text();
  offer.extra = in.get_text();
  offer.object = part.object;
  if (!in.finished() || transport > static_cast<std::uint8_t>(Transport::nccl_window)) {
    offer.error = "its offer of memory is malformed; do all ranks run one release?";
  } else {
    offer.transport = static_cast<Transport>(transport);
  }
  return offer;
}

std::string describe(const Offer& offer) { return fmt::format("{} bytes of {}", offer.bytes, name(offer.transport)); }

}  // namespace

Expected<std::vector<Offer>> agree_on_offers(const World& world, const Offer& mine, Deadline deadline) {
  auto parts = world_internal::gather(world, Phase::memory, encode(mine), deadline);
  if (!parts) return unexpected(std::move(parts.error()));
  std::vector<Offer> offers;
  for (const SharedPart& part : *parts) offers.push_back(decode(*part));
  Failure failure{.phase = Phase::memory, .rank = world.rank()};
  const auto cannot = std::find_if(offers.begin(), offers.end(), [](const Offer& offer) { return !offer.error.empty(); });
  if (cannot != offers.end()) {
    failure.peer = static_cast<int>(cannot - offers.begin());
    failure.kind = failure.peer == world.rank() ? FailureKind::system : FailureKind::aborted;
    failure.detail = fmt::format("rank {}: {}", failure.peer, cannot->error);
    return unexpected(std::move(failure));
  }
  const auto other = std::find_if(offers.begin(), offers.end(), [&](const Offer& offer) { return describe(offer) != describe(mine); });
  if (other != offers.end()) {
    failure.kind = FailureKind::mismatch;
    failure.peer = static_cast<int>(other - offers.begin());
    failure.detail = fmt::format("rank {} asks for {}, rank {} for {}", world.rank(), describe(mine), failure.peer, describe(*other));
    return unexpected(std::move(failure));
  }
  return offers;
}

int first_peer_without_memory(const World& world) {
  for (int peer = 0; peer < world.size(); ++peer) {
    if (world.link(peer) == LinkKind::network) return peer;
  }
  return -1;
}

}  // namespace tokenyard
