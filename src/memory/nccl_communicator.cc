#include "memory/nccl_communicator.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "core/usage.h"
#include "memory/cuda_handle.h"

namespace tokenyard::nccl {
namespace {

// What every rank tells the others before NCCL is asked for anything.
struct Card {
  std::array<char, 32> bus_id = {};
  UniqueId id = {};  // rank 0's is the communicator's
  std::array<char, 400> objection = {};
};

// Making an id opens a port that stays until all ranks have come.
std::string fill(Card& card, int device, bool makes_id) {
  const auto found = library();
  if (!found) return fmt::format("no NCCL: {}; {}", found.error().reason, found.error().remedy);
  if (cudaDeviceGetPCIBusId(card.bus_id.data(), static_cast<int>(card.bus_id.size()), device) != cudaSuccess) {
    cudaGetLastError();
    return fmt::format("device_index is {}, which is no GPU here", device);
  }
  if (!makes_id) return {};
  const Result result = (*found)->get_unique_id(&card.id);
  return result == Result::success ? "" : fmt::format("ncclGetUniqueId: {}", (*found)->get_error_string(result));
}

}  // namespace

UniqueId agree(const World& world, int device, std::string objection, Phase phase, Comm given) {
  Card mine;
  if (objection.empty()) objection = fill(mine, device, world.rank() == 0 && given == nullptr);
  std::memcpy(mine.objection.data(), objection.data(), std::min(objection.size(), mine.objection.size() - 1));
  const auto gathered = world.all_gather(std::as_bytes(std::span(&mine, 1)));
  if (!objection.empty()) throw UsageError(objection);
  std::vector<Card> cards(gathered.size());
  for (int rank = 0; rank < world.size(); ++rank) {
    std::memcpy(&cards[rank], gathered[rank].data(), sizeof(Card));
    if (cards[rank].objection[0] == '\0') continue;
    throw TransportError(
        {.kind = FailureKind::aborted, .phase = phase, .rank = world.rank(), .peer = rank, .detail = cards[rank].objection.data()});
  }
  for (int rank = 0; rank < world.size(); ++rank) {
    for (int other = 0; other < rank; ++other) {
      if (cards[other].bus_id != cards[rank].bus_id || world.host(other) != world.host(rank)) continue;
      usage_error("ranks {} and {} both use GPU {}; NCCL takes one rank per GPU: use as many GPUs as ranks, or transport cuda_peer", other,
                  rank, cards[rank].bus_id.data());
    }
  }
  return cards[0].id;
}

Communicator::Communicator(const World& world, const UniqueId& id, const Options& options)
    : world_(world), options_(options), library_(**nccl::library()) {
  const CudaDeviceScope scope(options_.device);
  Config config{.blocking = options_.blocking ? 1 : 0};
  value_or_throw(settle("ncclCommInitRankConfig", library_.comm_init_rank_config(&comm_, world_.size(), id, world_.rank(), &config)));
}

Communicator::Communicator(const World& world, Comm given, const Options& options)
    : world_(world), options_(options), library_(**nccl::library()), comm_(given), is_given_(true) {}

Expected<void> Communicator::settle(const char* what, Result result) {
  if (result == Result::in_progress) {
    auto waited =
        wait_until([&] { return library_.comm_get_async_error(comm_, &result) == Result::success && result != Result::in_progress; });
    if (!waited) return waited;
  }
  if (result == Result::success) return {};
  const char* const text = comm_ != nullptr ? library_.get_last_error(comm_) : nullptr;
  return give_up(FailureKind::system, -1,
                 fmt::format("{}: {}{}{}; NCCL_DEBUG=WARN tells more", what, library_.get_error_string(result), text != nullptr ? ": " : "",
                             text != nullptr ? text : ""));
}

Expected<void> Communicator::wait_until(const std::function<bool()>& done) {
  constexpr unsigned kSpins = 64;  // between looks at the clock
  constexpr auto kTick = std::chrono::milliseconds(1);
  if (done()) return {};
  const Deadline deadline = Deadline::after_ms(options_.timeout_ms);
  auto next_look = Deadline::Clock::now() + kTick;
  for (unsigned spins = 1; !done(); ++spins) {
    if (spins % kSpins != 0 || Deadline::Clock::now() < next_look) continue;
    if (auto fine = look_around(deadline); !fine) return fine;
    sched_yield();
    next_look = Deadline::Clock::now() + kTick;
  }
  return {};
}

Expected<void> Communicator::look_around(const Deadline& deadline) {
  for (int i = 1; i < world_.size(); ++i) {
    const int peer = (world_.rank() + i) % world_.size();
    if (!world_.alive(peer)) return give_up(FailureKind::peer_lost, peer, "its process ended, or its thread gave up");
  }
  Result state = Result::success;
  if (comm_ != nullptr) library_.comm_get_async_error(comm_, &state);
  if (state != Result::success && state != Result::in_progress) {
    return give_up(FailureKind::system, -1, fmt::format("NCCL: {}: {}", library_.get_error_string(state), library_.get_last_error(comm_)));
  }
  if (!deadline.expired()) return {};
  return give_up(FailureKind::timeout, -1,
                 fmt::format("NCCL is not done within {} ms, and does not say for which rank it waits; a rank did not make this call, is "
                             "stopped, or needs a longer timeout_ms",
                             options_.timeout_ms));
}

tl::unexpected<Failure> Communicator::give_up(FailureKind kind, int peer, std::string detail) {
  abort();
  return unexpected({.kind = kind, .phase = options_.phase, .rank = world_.rank(), .peer = peer, .detail = std::move(detail)});
}

void Communicator::abort() {
  Comm const comm = std::exchange(comm_, nullptr);
  if (comm != nullptr && !is_given_) library_.comm_abort(comm);
}

}  // namespace tokenyard::nccl
