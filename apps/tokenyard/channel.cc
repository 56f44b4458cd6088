#include "channel.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "tokenyard/error.h"

namespace tokenyard::cli {
namespace {

// The file is sparse: texts lie at fixed places far from each other.
constexpr long kHeaderBytes = 4096;
constexpr long kTextBytes = 1L << 30;
constexpr long kRequestAt = kHeaderBytes;
long answer_at(int rank) { return (rank + 1) * kTextBytes; }

void check(bool ok, const char* what) {
  if (!ok) throw Error(fmt::format("cannot {} the memory shared with rank processes: {}", what, std::strerror(errno)));
}

}  // namespace

struct Channel::Header {
  Progress progress;
  std::uint64_t request_bytes;
  std::atomic<std::uint64_t> answer_bytes[kMaxRanks];
};

Channel::Channel(int fd) : fd_(fd) {
  static_assert(sizeof(Header) <= kHeaderBytes);
  void* mapped = ::mmap(nullptr, kHeaderBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  check(mapped != MAP_FAILED, "map");
  header_ = static_cast<Header*>(mapped);
}

Channel::Channel(Channel&& other) noexcept : fd_(std::exchange(other.fd_, -1)), header_(std::exchange(other.header_, nullptr)) {}

Channel::~Channel() {
  if (header_ != nullptr) ::munmap(header_, kHeaderBytes);
  if (fd_ >= 0) ::close(fd_);
}

Channel Channel::create(const std::string& request) {
  const int fd = ::memfd_create("tokenyard", MFD_CLOEXEC);
  check(fd >= 0 && ::ftruncate(fd, answer_at(kMaxRanks)) == 0, "create");
  Channel channel(fd);
  channel.write_at(kRequestAt, request);
  channel.header_->request_bytes = request.size();
  return channel;
}

Channel Channel::open(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  check(fd >= 0, "open");
  return Channel(fd);
}

std::string Channel::path() const { return fmt::format("/proc/{}/fd/{}", ::getpid(), fd_); }

std::string Channel::request() const { return read_at(kRequestAt, header_->request_bytes); }

Progress& Channel::progress() const { return header_->progress; }

void Channel::answer(int rank, const std::string& text) const {
  write_at(answer_at(rank), text);
  header_->answer_bytes[rank].store(text.size(), std::memory_order_release);
}

std::string Channel::answer_of(int rank) const {
  return read_at(answer_at(rank), header_->answer_bytes[rank].load(std::memory_order_acquire));
}

void Channel::write_at(long offset, const std::string& text) const {
  check(static_cast<long>(text.size()) <= kTextBytes - kHeaderBytes, "fit a text into");
  check(::pwrite(fd_, text.data(), text.size(), offset) == std::ssize(text), "write");
}

std::string Channel::read_at(long offset, std::size_t bytes) const {
  std::string text(bytes, '\0');
  check(::pread(fd_, text.data(), bytes, offset) == static_cast<ssize_t>(bytes), "read");
  return text;
}

}  // namespace tokenyard::cli
