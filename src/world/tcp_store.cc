#include "world/tcp_store.h"

#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>

#include "core/interrupt.h"

namespace tokenyard::world_internal {
namespace {

constexpr std::chrono::milliseconds kRetry{20};
constexpr std::chrono::milliseconds kStoreGrace{500};  // the store answers at the deadline; this long after it, it does not
constexpr std::chrono::milliseconds kByeTime{1000};
constexpr std::size_t kReadBytes = std::size_t{64} << 10;

std::string who_holds(const StoreAddress& address) {
  const std::string holder = address.holder >= 0 ? fmt::format("rank {}", address.holder) : "the launcher";
  return fmt::format("the store at {} ({})", address.socket.text, holder);
}

Failure rendezvous_failure(const StoreAddress& address, const Hello& hello, FailureKind kind, const std::string& reason) {
  return {.kind = kind,
          .phase = Phase::rendezvous,
          .rank = hello.rank,
          .peer = address.holder,
          .detail = fmt::format("{} {}", who_holds(address), reason)};
}

// Reads until the answer to a hello is there. `again`: nothing was said before the end, as by a store that is just closing.
struct Answer {
  std::optional<Message> message;
  std::string error;
  bool again = false;
};
Answer read_answer(int socket, FrameReader& reader, Deadline deadline) {
  std::array<std::byte, 4096> buffer;
  bool silent = true;
  while (true) {
    auto message = reader.next();
    if (!message) return {std::nullopt, message.error(), false};
    if (*message) return {std::move(*message), {}, false};
    pollfd readable{.fd = socket, .events = POLLIN, .revents = 0};
    if (poll(&readable, 1, deadline.remaining_ms()) == 0) return {std::nullopt, "does not answer", false};
    const ssize_t bytes = recv(socket, buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (bytes > 0) {
      silent = false;
      reader.feed(std::span(buffer).first(static_cast<std::size_t>(bytes)));
    } else if (bytes == 0 || (errno != EAGAIN && errno != EINTR)) {
      return {std::nullopt, "ended the connection", silent};
    }
  }
}

}  // namespace

Expected<std::unique_ptr<TcpStore>> TcpStore::connect(const StoreAddress& address, const Hello& hello, Deadline deadline) {
  const std::vector<std::byte> greeting = encode(0, hello);
  std::string error;
  const auto pause = [&] { std::this_thread::sleep_for(std::min(kRetry, std::chrono::milliseconds(deadline.remaining_ms()))); };
  for (; !deadline.expired() && !interrupted(); pause()) {
    Attempt attempt = try_connect(address.socket, deadline);
    error = "cannot be reached: " + attempt.error;
    if (!attempt.fd && attempt.again) continue;
    if (!attempt.fd) return unexpected(rendezvous_failure(address, hello, FailureKind::system, error));
    FrameReader reader(kMaxFrameBytes);
    if (!send_all(attempt.fd.get(), greeting, deadline)) continue;
    Answer answer = read_answer(attempt.fd.get(), reader, deadline);
    error = answer.error;
    if (answer.again) continue;
    if (!answer.message) {
      return unexpected(rendezvous_failure(address, hello, deadline.expired() ? FailureKind::timeout : FailureKind::mismatch,
                                           fmt::format("{}; is the port that of another program?", error)));
    }
    if (const auto* reject = std::get_if<Reject>(&*answer.message)) {
      return unexpected(rendezvous_failure(address, hello, FailureKind::aborted, "rejected this rank: " + reject->reason));
    }
    if (std::holds_alternative<Welcome>(*answer.message)) {
      return std::unique_ptr<TcpStore>(new TcpStore(address, hello, std::move(attempt.fd), std::move(reader)));
    }
    return unexpected(rendezvous_failure(address, hello, FailureKind::mismatch, "answered a hello with something else"));
  }
  return unexpected(rendezvous_failure(address, hello, FailureKind::timeout, fmt::format("{} within {} ms", error, deadline.timeout_ms())));
}

TcpStore::TcpStore(StoreAddress address, const Hello& hello, Fd socket, FrameReader reader)
    : address_(std::move(address)),
      size_(hello.size),
      rank_(hello.rank),
      socket_(std::move(socket)),
      reader_(std::move(reader)),
      lost_(new std::atomic<bool>[hello.size]()),
      thread_([this] { listen(); }) {}

TcpStore::~TcpStore() {
  static_cast<void>(send(Bye{}, Deadline::after_ms(static_cast<int>(kByeTime.count()))));
  // The store hangs up once it has read the bye. Closing first could throw the bye away with what we have not read.
  shutdown(socket_.get(), SHUT_WR);
  {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kByeTime, [this] { return ended_; });
  }
  shutdown(socket_.get(), SHUT_RDWR);
  thread_.join();
}

Expected<void> TcpStore::send(const Message& message, Deadline deadline) {
  const std::lock_guard lock(send_mutex_);
  auto sent = send_all(socket_.get(), encode(sequence_++, message), deadline);
  // Half a message may be out: nothing after it could be understood.
  if (!sent) break_off(fmt::format("does not take messages: {}", sent.error().detail));
  return sent;
}

Expected<Gathered> TcpStore::gather(const Call& call, SharedPart mine, Deadline deadline) {
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.empty()) return unexpected(store_failure(call, FailureKind::peer_lost, broken_));
    pending_.emplace(call.key, Pending{});
  }
  // A failure to send breaks the connection off, and the wait below ends with the reason.
  static_cast<void>(send(GatherRequest{call, deadline.remaining_ms(), mine->bytes}, deadline));
  std::unique_lock lock(mutex_);
  const auto at = pending_.find(call.key);
  const auto is_over = [&] { return at->second.outcome.has_value() || !broken_.empty(); };
  bool answered = false;
  bool gives_up = false;
  const auto end = deadline.at() + kStoreGrace;
  while (!answered && !gives_up && Deadline::Clock::now() < end) {
    const auto until = is_interruptible() ? std::min(end, Deadline::Clock::now() + kInterruptTick) : end;
    answered = changed_.wait_until(lock, until, is_over);
    lock.unlock();  // the check may wait for locks of the caller, whose other threads may wait for this one
    gives_up = !answered && interrupted();
    lock.lock();
  }
  const auto node = pending_.extract(at);
  if (node.mapped().outcome) return std::move(*node.mapped().outcome);
  if (gives_up) return unexpected(store_failure(call, FailureKind::system, "has not answered, and the caller gave up"));
  if (answered) return unexpected(store_failure(call, FailureKind::peer_lost, broken_));
  return unexpected(store_failure(call, FailureKind::timeout, fmt::format("did not answer within {} ms", deadline.timeout_ms())));
}

Failure TcpStore::store_failure(const Call& call, FailureKind kind, const std::string& reason) const {
  const auto index_of = [&](int rank) {
    const auto at = std::find(call.members.begin(), call.members.end(), rank);
    return at == call.members.end() ? -1 : static_cast<int>(at - call.members.begin());
  };
  return {.kind = kind,
          .phase = call.phase,
          .rank = index_of(rank_),
          .peer = index_of(address_.holder),
          .detail = fmt::format("{} {}", who_holds(address_), reason)};
}

void TcpStore::give_up(std::string_view reason) {
  lost_[rank_].store(true, std::memory_order_release);
  static_cast<void>(send(GiveUp{std::string(reason)}, Deadline::after_ms(static_cast<int>(kByeTime.count()))));
}

void TcpStore::listen() {
  std::vector<std::byte> buffer(kReadBytes);
  std::string end;
  while (end.empty()) {
    auto message = reader_.next();
    if (!message) {
      end = "says what cannot be understood: " + message.error();
    } else if (*message) {
      handle(std::move(**message));
    } else {
      pollfd readable{.fd = socket_.get(), .events = POLLIN, .revents = 0};
      poll(&readable, 1, -1);
      const ssize_t bytes = recv(socket_.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
      if (bytes > 0)
        reader_.feed(std::span(buffer).first(static_cast<std::size_t>(bytes)));
      else if (bytes == 0)
        end = "ended";
      else if (errno != EAGAIN && errno != EINTR)
        end = fmt::format("ended: {}", std::strerror(errno));
    }
  }
  break_off(std::move(end));
  const std::lock_guard lock(mutex_);
  ended_ = true;
  changed_.notify_all();
}

void TcpStore::break_off(std::string reason) {
  const std::lock_guard lock(mutex_);
  if (broken_.empty()) broken_ = std::move(reason);
  if (address_.holder >= 0 && address_.holder != rank_) lost_[address_.holder].store(true, std::memory_order_release);
  changed_.notify_all();
}

void TcpStore::handle(Message&& message) {
  if (const auto* reject = std::get_if<Reject>(&message)) return break_off("rejected this rank: " + reject->reason);
  if (const auto* lost = std::get_if<RankLost>(&message)) {
    if (lost->rank >= 0 && lost->rank < size_) lost_[lost->rank].store(true, std::memory_order_release);
    return;
  }
  const std::lock_guard lock(mutex_);
  const auto find = [&](const GatherKey& key) {
    const auto at = pending_.find(key);  // nobody waits any more: the caller has timed out
    return at == pending_.end() || at->second.outcome ? nullptr : &at->second;
  };
  if (auto* part = std::get_if<GatherPart>(&message)) {
    if (Pending* pending = find(part->key)) {
      pending->gathered.parts.push_back(std::make_shared<const Part>(Part{.bytes = std::move(part->bytes), .object = nullptr}));
    }
  } else if (const auto* done = std::get_if<GatherDone>(&message)) {
    if (Pending* pending = find(done->key)) {
      pending->gathered.serial = done->serial;
      pending->outcome = std::move(pending->gathered);
    }
  } else if (const auto* failed = std::get_if<GatherFailed>(&message)) {
    if (Pending* pending = find(failed->key)) pending->outcome = unexpected(failed->failure);
  }
  changed_.notify_all();
}

}  // namespace tokenyard::world_internal
