#include <algorithm>
#include <cstring>
#include <string>

#include "collective/direct.h"
#include "collective/mpi.h"
#include "core/usage.h"
#include "tokenyard/collective.h"

namespace tokenyard {
namespace {

constexpr std::int64_t kMinStagingBytes = 4096;
constexpr std::int64_t kMaxStagingBytes = std::int64_t{1} << 40;

std::string objection(const World& world, const CollectiveOptions& options) {
  if (options.staging_bytes < kMinStagingBytes || options.staging_bytes > kMaxStagingBytes) {
    return fmt::format("CollectiveOptions.staging_bytes is {}; it must be in [{}, {}]", options.staging_bytes, kMinStagingBytes,
                       kMaxStagingBytes);
  }
  if (options.timeout_ms <= 0) return fmt::format("CollectiveOptions.timeout_ms is {}; it must be > 0", options.timeout_ms);
  return options.transport == Transport::mpi ? collective_internal::mpi_objection(world) : std::string();
}

// What must be the same on all ranks, or why this rank refuses.
struct Wish {
  std::int64_t staging_bytes = 0;
  Transport transport = Transport::automatic;
  char objection[256] = {};
};

std::string describe(const Wish& wish) {
  return fmt::format("{{.staging_bytes = {}, .transport = {}}}", wish.staging_bytes, name(wish.transport));
}

// All ranks learn all options, so that one that cannot work fails on every rank instead of leaving some in a wait.
void agree(const World& world, const CollectiveOptions& options) {
  Wish mine{.staging_bytes = options.staging_bytes, .transport = options.transport};
  const std::string why_not = objection(world, options);
  std::memcpy(mine.objection, why_not.data(), std::min(why_not.size(), sizeof(mine.objection) - 1));
  const auto wishes = world.all_gather(std::as_bytes(std::span(&mine, 1)));
  if (!why_not.empty()) throw UsageError(why_not);
  for (int peer = 0; peer < world.size(); ++peer) {
    Wish theirs;
    std::memcpy(&theirs, wishes[peer].data(), sizeof theirs);
    Failure failure{
        .kind = FailureKind::aborted, .phase = Phase::collective, .rank = world.rank(), .peer = peer, .detail = theirs.objection};
    if (theirs.objection[0] != '\0') throw TransportError(std::move(failure));
    if (theirs.staging_bytes == mine.staging_bytes && theirs.transport == mine.transport) continue;
    failure.kind = FailureKind::mismatch;
    failure.detail = fmt::format("options differ: rank {} has {}, rank {} has {}", world.rank(), describe(mine), peer, describe(theirs));
    throw TransportError(std::move(failure));
  }
}

}  // namespace

std::unique_ptr<Collectives> Collectives::create(const World& world, const CollectiveOptions& options) {
  agree(world, options);
  return options.transport == Transport::mpi ? collective_internal::make_mpi(world, options)
                                             : collective_internal::make_direct(world, options);
}

}  // namespace tokenyard
