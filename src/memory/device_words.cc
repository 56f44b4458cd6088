#include "memory/device_words.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "memory/cuda_handle.h"
#include "memory/cuda_peer.h"
#include "memory/nccl_window.h"
#include "protocol/wait_chain.h"

namespace tokenyard {

using protocol::DeviceMailbox;
using protocol::ErrorRecord;
using protocol::OwnWords;

namespace {

Expected<std::unique_ptr<SymmetricMemory>> make_memory(const World& world, const DeviceWordsOptions& options) {
  const auto bytes = static_cast<std::size_t>(options.arena_bytes);
  if (options.transport != Transport::nccl_window)
    return CudaPeerMemory::create(world, bytes, options.device, Deadline::after_ms(options.timeout_ms));
  return create_nccl_window(world, bytes,
                            {.device = options.device, .communicator = options.nccl_communicator, .timeout_ms = options.timeout_ms});
}

}  // namespace

DeviceWords::DeviceWords(const World& world, const protocol::ArenaLayout& layout, const DeviceWordsOptions& options)
    : device_(options.device) {
  const auto table_bytes = static_cast<std::size_t>(world.size()) * sizeof(std::byte*);
  words_ = value_or_throw(make_device_buffer(device_, sizeof(OwnWords) + table_bytes + static_cast<std::size_t>(options.own_bytes)));
  pinned_ = value_or_throw(make_pinned_buffer(sizeof(protocol::HostWords)));
  new (pinned_.data()) protocol::HostWords{};
  side_ = value_or_throw(borrow_cuda_stream());
  memory_ = value_or_throw(make_memory(world, options));

  std::byte* const table = words_.data() + sizeof(OwnWords);
  own_ = table + table_bytes;
  view_ = {.arenas = reinterpret_cast<std::byte* const*>(table),
           .layout = layout,
           .rank = world.rank(),
           .ranks = world.size(),
           .timeout_ns = static_cast<std::uint64_t>(options.timeout_ms) * 1'000'000U,
           .state = &words_.as<OwnWords>()->state,
           .tickets = words_.as<OwnWords>()->tickets,
           .failure = &host().failure,
           .abort = &host().abort,
           .stop = &host().stop};
  std::vector<std::byte*> arenas;
  for (int rank = 0; rank < world.size(); ++rank) arenas.push_back(at(rank, 0));
  std::copy_n(arenas.begin(), std::min(world.size(), protocol::kNearRanks), view_.near_arenas);
  cuda_check(cudaMemsetAsync(words_.data(), 0, words_.bytes(), side()), "clearing the words of a GPU");
  cuda_check(cudaMemcpyAsync(table, arenas.data(), table_bytes, cudaMemcpyDefault, side()), "filling the table of arenas");
  // On a stream of its own: a wait for the whole device would wait for kernels of ranks that wait for this one.
  cuda_check(cudaStreamSynchronize(side()), "preparing the words of a GPU");
}

void DeviceWords::read(void* to, const void* from, std::size_t bytes) const {
  cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, side()), "reading the words of a GPU");
  cuda_check(cudaStreamSynchronize(side()), "reading the words of a GPU");
}

std::optional<ErrorRecord> DeviceWords::lasting_failure() const {
  if (host().failure.set == 0) return std::nullopt;
  return host().failure;
}

std::optional<ErrorRecord> DeviceWords::take_failure() const {
  if (host().failure.set != 0) return host().failure;
  if (host().abort.set == 0) return std::nullopt;
  const ErrorRecord record = host().abort;
  host().abort.set = 0;  // told once: the next call is fine
  return record;
}

Failure DeviceWords::describe(const ErrorRecord& record) const {
  const CudaDeviceScope scope(device_);
  Failure failure{.kind = static_cast<FailureKind>(record.kind),
                  .phase = static_cast<Phase>(record.phase),
                  .rank = view_.rank,
                  .peer = record.peer,
                  .epoch = record.call,
                  .expected = record.expected,
                  .seen = record.seen};
  switch (failure.kind) {
    case FailureKind::timeout:
      failure.peer = protocol::end_of_chain(view_.rank, view_.ranks, record.peer, [&](int rank) {
        return static_cast<int>(read<protocol::DeviceBeacon>(at(rank, layout().beacon)).waiting_on) - 1;
      });
      failure.detail = fmt::format("no sign within {} ms", view_.timeout_ns / 1'000'000U);
      if (failure.peer != record.peer) failure.detail += fmt::format("; rank {} waits for it, directly or not", record.peer);
      break;
    case FailureKind::peer_lost:
      failure.detail = "its process ended, or its thread gave up";
      break;
    case FailureKind::aborted:
      failure.detail = reason_of(record.peer, record.call);
      break;
    default:
      break;
  }
  return failure;
}

std::string DeviceWords::reason_of(int peer, std::uint64_t call) const {
  char text[protocol::kReasonBytes];
  const std::byte* const box = at(view_.rank, layout().mailboxes + peer * layout().mailbox_bytes);
  read(text, box + offsetof(DeviceMailbox, reason), sizeof text);
  const std::string reason(text, strnlen(text, sizeof text));
  const auto rejected = read<std::uint64_t>(box + offsetof(DeviceMailbox, aborted));
  return rejected <= call ? reason : fmt::format("rejected this and later calls; of call {}: {}", rejected, reason);
}

void DeviceWords::set_reason(const std::string& reason) const {
  const std::size_t length = std::min(reason.size(), sizeof(protocol::HostWords::reason) - 1);
  std::memcpy(host().reason, reason.data(), length);
  host().reason[length] = '\0';
}

std::unique_ptr<LostWatch> DeviceWords::watch(const World& world) const {
  return std::make_unique<LostWatch>(world, [stop = &host().stop](int rank) { stop->lost_peer = rank + 1; });
}

}  // namespace tokenyard
