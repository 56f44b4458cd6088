#pragma once
// Who holds which of a few buffers. Buffers are handed out in the order in which they became free; a lease is a
// shared_ptr whose last owner gives the buffer back, from any thread, also after the exchange is gone.

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "tokenyard/options.h"

namespace tokenyard::exchange_internal {

class LeaseBoard : public std::enable_shared_from_this<LeaseBoard> {
 public:
  // on_free(buffer) runs when a buffer comes back, under the board's lock.
  LeaseBoard(int buffers, std::function<void(int buffer)> on_free);

  // Claims a buffer for a call that is started and has not run yet. UsageError that names the holders when all are held.
  void reserve(const char* what);
  void unreserve();
  // The buffer of the oldest free grant, which the running call has reserved.
  int front() const;
  // Takes front(); error texts say whose rows it holds.
  struct Holder {
    std::uint64_t call = 0;
    Layout layout = Layout::token_major;
  };
  std::shared_ptr<void> lease(Holder holder);
  std::vector<int> free_buffers() const;
  // Under the lock, so that no lease comes back in between: begin(), then announce(buffer) for every free one in order.
  void restart(const std::function<void()>& begin, const std::function<void(int)>& announce) const;

 private:
  void give_back(int buffer);

  mutable std::mutex mutex_;
  int reserved_ = 0;
  std::deque<int> free_;
  std::vector<std::optional<Holder>> holders_;  // [buffers]
  std::function<void(int)> on_free_;
};

}  // namespace tokenyard::exchange_internal
