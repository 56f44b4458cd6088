#include "world/signal_relay.h"

#include <sys/eventfd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <mutex>

#include "core/usage.h"

namespace tokenyard::world_internal {
namespace {

constexpr int kMaxRelays = 64;
constexpr std::array kSignals{SIGINT, SIGTERM};

// Signal handlers have no argument of their own, so this state is global; they only touch the lock-free atomics.
struct Slot {
  std::atomic<pid_t> group{0};
  std::atomic<int> event{-1};
};
std::array<Slot, kMaxRelays> slots;
std::mutex mutex;  // around the slots' allocation and the two below
std::array<struct sigaction, kSignals.size()> previous;
int num_relays = 0;

void relay(int signal) {
  const int saved = errno;
  for (Slot& slot : slots) {
    if (const pid_t group = slot.group.load(); group > 0) kill(-group, signal);
    if (const int event = slot.event.load(); event >= 0) eventfd_write(event, 1);
  }
  errno = saved;
}

void install() {
  for (std::size_t i = 0; i < kSignals.size(); ++i) {
    sigaction(kSignals[i], nullptr, &previous[i]);
    if (previous[i].sa_handler == SIG_IGN) continue;
    struct sigaction action = {};
    action.sa_handler = relay;
    action.sa_flags = SA_RESTART;
    sigaction(kSignals[i], &action, nullptr);
  }
}

void restore() {
  for (std::size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &previous[i], nullptr);
}

}  // namespace

SignalRelay::SignalRelay() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), slot_(0) {
  const std::lock_guard lock(mutex);
  while (slot_ < kMaxRelays && slots[slot_].event.load() >= 0) ++slot_;
  if (slot_ == kMaxRelays) usage_error("{} launches at once: wait for one to end", kMaxRelays + 1);
  slots[slot_].event.store(event_.get());
  if (num_relays++ == 0) install();
}

SignalRelay::~SignalRelay() {
  const std::lock_guard lock(mutex);
  if (--num_relays == 0) restore();
  slots[slot_].group.store(0);
  slots[slot_].event.store(-1);
}

void SignalRelay::set_group(pid_t group) { slots[slot_].group.store(group); }

}  // namespace tokenyard::world_internal
