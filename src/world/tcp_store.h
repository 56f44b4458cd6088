#pragma once
// A rank's connection to a store in another process (or to its own, on rank 0).

#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "world/frame.h"
#include "world/socket.h"
#include "world/store.h"

namespace tokenyard::world_internal {

struct StoreAddress {
  SocketAddress socket;
  int holder = -1;  // the rank whose process holds the store; -1: a launcher
};

class TcpStore final : public Store {
 public:
  // Waits for the store to come up, until the deadline.
  static Expected<std::unique_ptr<TcpStore>> connect(const StoreAddress& address, const Hello& hello, Deadline deadline);
  ~TcpStore() override;

  Expected<Gathered> gather(const Call& call, SharedPart mine, Deadline deadline) override;
  bool lost(int rank) const override { return lost_[rank].load(std::memory_order_acquire); }
  void give_up(std::string_view reason) override;

 private:
  struct Pending {
    Gathered gathered;
    std::optional<Expected<Gathered>> outcome;
  };

  TcpStore(StoreAddress address, const Hello& hello, Fd socket, FrameReader reader);
  Expected<void> send(const Message& message, Deadline deadline);
  // The thread that reads what the store says.
  void listen();
  void handle(Message&& message);
  // The connection is of no use any more.
  void break_off(std::string reason);
  Failure store_failure(const Call& call, FailureKind kind, const std::string& reason) const;

  StoreAddress address_;
  int size_;
  int rank_;
  Fd socket_;
  FrameReader reader_;
  std::unique_ptr<std::atomic<bool>[]> lost_;

  std::mutex send_mutex_;
  std::uint32_t sequence_ = 1;  // of the next message; the hello was 0

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<GatherKey, Pending> pending_;
  std::string broken_;  // why, when the connection is of no use
  bool ended_ = false;  // the thread has
  std::thread thread_;
};

}  // namespace tokenyard::world_internal
