#include "memory/symmetric_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <vector>

#include "core/usage.h"
#include "memory/fd_exchange.h"
#include "memory/mapping.h"
#include "memory/offer.h"

namespace tokenyard {
namespace {

using world_internal::Fd;

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr unsigned int kHuge2MiB = 21U << 26;  // MFD_HUGE_2MB, which glibc's headers lack

class Inproc final : public SymmetricMemory {
 public:
  Inproc(std::vector<std::shared_ptr<Mapping>> arenas, int rank) : arenas_(std::move(arenas)), rank_(rank) {}
  std::byte* view(int rank) const override { return arenas_.at(rank)->data(); }
  std::size_t bytes() const override { return arenas_[rank_]->bytes(); }
  Transport transport() const override { return Transport::inproc; }

 private:
  std::vector<std::shared_ptr<Mapping>> arenas_;  // shared with the peers, so that views outlive their owners
  int rank_;
};

Expected<std::unique_ptr<SymmetricMemory>> create_inproc(const World& world, Offer mine, Deadline deadline) {
  if (mine.error.empty()) {
    auto arena = map_private(mine.bytes);
    if (arena)
      mine.object = std::make_shared<Mapping>(std::move(*arena));
    else
      mine.error = arena.error().detail;
  }
  auto offers = agree_on_offers(world, mine, deadline);
  if (!offers) return unexpected(std::move(offers.error()));
  std::vector<std::shared_ptr<Mapping>> arenas;
  for (Offer& offer : *offers) arenas.push_back(std::static_pointer_cast<Mapping>(std::move(offer.object)));
  return std::make_unique<Inproc>(std::move(arenas), world.rank());
}

class Shm final : public SymmetricMemory {
 public:
  Shm(std::vector<Mapping> arenas, std::size_t bytes) : arenas_(std::move(arenas)), bytes_(bytes) {}
  std::byte* view(int rank) const override { return arenas_.at(rank).data(); }
  std::size_t bytes() const override { return bytes_; }
  Transport transport() const override { return Transport::shm; }

 private:
  std::vector<Mapping> arenas_;
  std::size_t bytes_;
};

// A memory file that nobody can resize any more: a peer that truncated it would kill the others with SIGBUS.
Expected<Fd> sealed_file(std::size_t bytes, unsigned int flags) {
  Fd fd(memfd_create("tokenyard", MFD_CLOEXEC | MFD_ALLOW_SEALING | flags));
  if (!fd) return unexpected(system_failure("memfd_create"));
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0 || fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return unexpected(system_failure(fmt::format("cannot make a sealed memory file of {} bytes", bytes)));
  }
  return fd;
}

Expected<Fd> arena_file(std::size_t bytes) {
  if (bytes >= kHugePage) {
    const std::size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    auto huge = sealed_file(rounded, MFD_HUGETLB | kHuge2MiB);
    // Only fallocate takes the pages from the pool for good; without it a first touch could find the pool empty, a SIGBUS.
    if (huge && fallocate(huge->get(), 0, 0, static_cast<off_t>(rounded)) == 0) return huge;
  }
  return sealed_file(bytes, 0);
}

// A peer's file is only mapped when it is as large as promised and cannot shrink.
Expected<Mapping> map_peer(int fd, std::size_t bytes, int peer) {
  struct stat status = {};
  const int seals = fcntl(fd, F_GET_SEALS);
  const auto file_bytes = fstat(fd, &status) == 0 ? static_cast<std::size_t>(status.st_size) : 0;
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || file_bytes < bytes || file_bytes >= bytes + kHugePage) {
    return unexpected(
        {.kind = FailureKind::mismatch,
         .phase = Phase::memory,
         .peer = peer,
         .detail = fmt::format("its memory file has {} bytes and seals {}; expected {} sealed bytes", file_bytes, seals, bytes)});
  }
  return map_shared(fd, file_bytes);
}

// Everything of create_shm between the two agreements: this rank's own arena, then the peers'.
Expected<std::vector<Mapping>> swap_arenas(const World& world, const FdExchange& exchange, const std::vector<Offer>& offers, const Fd& file,
                                           Deadline deadline) {
  std::vector<FdExchange::Endpoint> endpoints;
  for (const Offer& offer : offers) endpoints.push_back(offer.endpoint);
  auto fds = exchange.swap(world, endpoints, file.get(), deadline);
  if (!fds) return unexpected(std::move(fds.error()));
  std::vector<Mapping> arenas;
  for (int peer = 0; peer < world.size(); ++peer) {
    const Fd& fd = peer == world.rank() ? file : (*fds)[peer];
    auto arena = map_peer(fd.get(), offers[peer].bytes, peer);
    if (!arena) return unexpected(std::move(arena.error()));
    arenas.push_back(std::move(*arena));
  }
  return arenas;
}

Expected<std::unique_ptr<SymmetricMemory>> create_shm(const World& world, Offer mine, Deadline deadline) {
  Expected<Fd> file = Fd();
  Expected<FdExchange> exchange = FdExchange();
  if (mine.error.empty()) {
    file = arena_file(mine.bytes);
    exchange = FdExchange::listen();
    if (!file)
      mine.error = file.error().detail;
    else if (!exchange)
      mine.error = exchange.error().detail;
    else
      mine.endpoint = exchange->endpoint();
  }
  const auto offers = agree_on_offers(world, mine, deadline);
  if (!offers) return unexpected(offers.error());
  auto arenas = swap_arenas(world, *exchange, *offers, *file, deadline);
  // A rank that failed must not leave the others believing that its memory is there.
  if (!arenas) mine.error = arenas.error().message();
  const auto confirmed = agree_on_offers(world, mine, deadline);
  // The store's word on who is lost goes before what this rank saw: a rank that gave up over a lost one may be gone by now too.
  if (!confirmed && confirmed.error().kind == FailureKind::peer_lost) return unexpected(confirmed.error());
  if (!arenas) {
    arenas.error().rank = world.rank();
    return unexpected(std::move(arenas.error()));
  }
  if (!confirmed) return unexpected(confirmed.error());
  return std::make_unique<Shm>(std::move(*arenas), mine.bytes);
}

Transport choose(const World& world, Transport wanted) {
  if (wanted == Transport::automatic) wanted = world.is_in_process() ? Transport::inproc : Transport::shm;
  switch (wanted) {
    case Transport::inproc:
      if (!world.is_in_process()) usage_error("transport inproc: the ranks of this world are processes; use shm, or automatic");
      break;
    case Transport::shm:
      if (const int peer = first_peer_without_memory(world); peer >= 0) {
        usage_error(
            "transport shm: rank {} (host {}) and rank {} (host {}) share no memory: other machine, network namespace or user; "
            "place all ranks on one host, or use a transport for networks",
            world.rank(), world.host(world.rank()), peer, world.host(peer));
      }
      break;
    case Transport::cuda_peer:
    case Transport::nccl_window:
      usage_error("transport {} is memory of GPUs; use it with device = cuda, or inproc, shm or automatic on CPUs", name(wanted));
    default:
      usage_error("transport {} has no peer-addressable memory; use inproc, shm or automatic", name(wanted));
  }
  return wanted;
}

}  // namespace

Expected<std::unique_ptr<SymmetricMemory>> SymmetricMemory::create(const World& world, std::size_t bytes, Transport transport,
                                                                   Deadline deadline) {
  transport = choose(world, transport);
  Offer mine{.bytes = bytes, .transport = transport};
  if (const auto rounded = arena_bytes(bytes))
    mine.bytes = *rounded;
  else
    mine.error = rounded.error().detail;
  return transport == Transport::inproc ? create_inproc(world, std::move(mine), deadline) : create_shm(world, std::move(mine), deadline);
}

}  // namespace tokenyard
