#include "memory/mapping.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace tokenyard {
namespace {

Expected<Mapping> map(std::size_t bytes, int flags, int fd) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (data == MAP_FAILED) return unexpected(system_failure(fmt::format("cannot map {} bytes", bytes)));
  // Advice: where huge pages are not configured it fails, and small pages do.
  madvise(data, bytes, MADV_HUGEPAGE);
  return Mapping(static_cast<std::byte*>(data), bytes);
}

}  // namespace

Mapping::Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Expected<Mapping> map_private(std::size_t bytes) { return map(bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1); }
Expected<Mapping> map_shared(int fd, std::size_t bytes) { return map(bytes, MAP_SHARED, fd); }

Expected<std::size_t> arena_bytes(std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  struct sysinfo machine = {};
  sysinfo(&machine);
  const std::size_t total = (machine.totalram + machine.totalswap) * machine.mem_unit;
  if (bytes > total) {
    return unexpected({.kind = FailureKind::system,
                       .phase = Phase::memory,
                       .detail = fmt::format("an arena of {} bytes on a machine with {} bytes of memory and swap; lower "
                                             "max_tokens_per_rank, receive_rows or depth (Exchange::memory_plan shows what takes how much)",
                                             bytes, total)});
  }
  const std::size_t pages = bytes == 0 ? 1 : (bytes + page - 1) / page;
  return pages * page;
}

Failure system_failure(const std::string& what) {
  const int error = errno;
  return {.kind = FailureKind::system, .phase = Phase::memory, .detail = fmt::format("{}: {}", what, std::strerror(error))};
}

}  // namespace tokenyard
