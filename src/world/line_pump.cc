#include "world/line_pump.h"

#include <poll.h>

#include <array>
#include <cerrno>
#include <string_view>

namespace tokenyard::world_internal {
namespace {

constexpr std::size_t kLongestLine = std::size_t{64} << 10;  // a longer one is broken: a rank must not fill the launcher's memory

void write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(fd, text.data(), text.size());
    if (written > 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EAGAIN) {
      pollfd writable{.fd = fd, .events = POLLOUT, .revents = 0};
      poll(&writable, 1, -1);
    } else if (errno != EINTR) {
      return;  // nobody listens
    }
  }
}

}  // namespace

void LinePump::take(std::string_view text, std::string& out) {
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view piece = text.substr(0, std::min(end, kLongestLine - line_.size()));
    line_ += piece;
    text.remove_prefix(piece.size());
    const bool ended = !text.empty() && text.front() == '\n';
    if (ended) text.remove_prefix(1);
    if (!ended && line_.size() < kLongestLine) return;
    out += prefix_ + line_ + '\n';
    line_.clear();
  }
}

void LinePump::pump() {
  std::array<char, 16384> buffer;
  std::string out;
  while (from_) {
    const ssize_t bytes = read(from_.get(), buffer.data(), buffer.size());
    if (bytes > 0) {
      take({buffer.data(), static_cast<std::size_t>(bytes)}, out);
    } else if (bytes == 0 || (errno != EAGAIN && errno != EINTR)) {
      from_.reset();
    } else if (errno == EAGAIN) {
      break;
    }
    if (out.size() > kLongestLine) break;  // the other ranks have a turn
  }
  write_all(to_, out);
}

void LinePump::finish() {
  pump();
  if (!line_.empty()) write_all(to_, prefix_ + line_ + '\n');
  line_.clear();
  from_.reset();
}

}  // namespace tokenyard::world_internal
