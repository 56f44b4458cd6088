#pragma once
// Mapped memory with one owner, and the checks before it.

#include <cstddef>
#include <string>

#include "core/expected.h"

namespace tokenyard {

// munmap at the end of life.
class Mapping {
 public:
  Mapping() = default;
  Mapping(std::byte* data, std::size_t bytes) : data_(data), bytes_(bytes) {}
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Zero-filled, private to this process (rank threads share it), huge pages where the kernel likes.
Expected<Mapping> map_private(std::size_t bytes);
// Pages of a file that peers map too. Not touched yet.
Expected<Mapping> map_shared(int fd, std::size_t bytes);

// Rounded up to pages, at least one. An arena larger than this machine's memory and swap is refused here: where the kernel
// overcommits, it would be granted and the process killed at first touch.
Expected<std::size_t> arena_bytes(std::size_t bytes);

// errno's text as a Failure of Phase::memory.
Failure system_failure(const std::string& what);

}  // namespace tokenyard
