#include "exchange/lease_board.h"

#include "core/usage.h"

namespace tokenyard::exchange_internal {

LeaseBoard::LeaseBoard(int buffers, std::function<void(int)> on_free) : holders_(buffers), on_free_(std::move(on_free)) {
  for (int buffer = 0; buffer < buffers; ++buffer) free_.push_back(buffer);
}

void LeaseBoard::reserve(const char* what) {
  const std::lock_guard lock(mutex_);
  if (reserved_ < static_cast<int>(free_.size())) {
    ++reserved_;
    return;
  }
  std::string text;
  for (std::size_t buffer = 0; buffer < holders_.size(); ++buffer) {
    const std::optional<Holder>& holder = holders_[buffer];
    if (!holder) continue;
    text += fmt::format("{}buffer {}: rows of call {} ({})", text.empty() ? "" : "; ", buffer, holder->call, name(holder->layout));
  }
  if (reserved_ > 0) text += fmt::format("{}{} promised to dispatches that were started", text.empty() ? "" : "; ", reserved_);
  usage_error("all {} {} are held ({}); release a Received, or raise depth", holders_.size(), what, text);
}

void LeaseBoard::unreserve() {
  const std::lock_guard lock(mutex_);
  --reserved_;
}

int LeaseBoard::front() const {
  const std::lock_guard lock(mutex_);
  TY_ASSERT(!free_.empty());
  return free_.front();
}

std::shared_ptr<void> LeaseBoard::lease(Holder holder) {
  const std::lock_guard lock(mutex_);
  TY_ASSERT(!free_.empty() && reserved_ > 0);
  const int buffer = free_.front();
  free_.pop_front();
  --reserved_;
  holders_[buffer] = holder;
  // Points to something, so that it is not taken for no lease.
  return {static_cast<void*>(this), [board = shared_from_this(), buffer](void*) { board->give_back(buffer); }};
}

std::vector<int> LeaseBoard::free_buffers() const {
  const std::lock_guard lock(mutex_);
  return {free_.begin(), free_.end()};
}

void LeaseBoard::restart(const std::function<void()>& begin, const std::function<void(int)>& announce) const {
  const std::lock_guard lock(mutex_);
  begin();
  for (const int buffer : free_) announce(buffer);
}

void LeaseBoard::give_back(int buffer) {
  const std::lock_guard lock(mutex_);
  holders_[buffer].reset();
  free_.push_back(buffer);
  on_free_(buffer);
}

}  // namespace tokenyard::exchange_internal
