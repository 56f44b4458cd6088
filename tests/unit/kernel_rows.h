#pragma once
// Rows for kernel tests: memory whose surroundings are watched, values that matter, and elements read and written one
// by one as kernels.h defines them.

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "seeded_random.h"
#include "small_float.h"

namespace tokenyard::testing {

// Between two pages that cannot be read or written: flush with one of them, or somewhere inside.
class GuardedRow {
 public:
  GuardedRow(SeededRandom& random, std::size_t bytes, std::int64_t alignment = 1) : bytes_(bytes), inside_((bytes / kPage + 2) * kPage) {
    map_ = mmap(nullptr, inside_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map_ == MAP_FAILED || mprotect(begin(), inside_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    std::memset(begin(), kWatch, inside_);
    const auto room = static_cast<std::int64_t>(inside_ - bytes);
    const std::int64_t offsets[] = {0, room, random.between(0, room)};
    row_ = begin() + random.pick(offsets) / alignment * alignment;
  }
  ~GuardedRow() { munmap(map_, inside_ + 2 * kPage); }
  GuardedRow(const GuardedRow&) = delete;
  GuardedRow& operator=(const GuardedRow&) = delete;

  std::byte* data() const { return row_; }
  std::size_t bytes() const { return bytes_; }
  bool untouched_outside() const {
    const auto is_watch = [](std::byte b) { return b == std::byte{kWatch}; };
    return std::all_of(begin(), row_, is_watch) && std::all_of(row_ + bytes_, begin() + inside_, is_watch);
  }

 private:
  static constexpr std::size_t kPage = 4096;
  static constexpr unsigned char kWatch = 0xa5;
  std::byte* begin() const { return static_cast<std::byte*>(map_) + kPage; }
  std::size_t bytes_;
  std::size_t inside_;
  void* map_;
  std::byte* row_;
};

// Runs body once per instruction set of this machine.
template <class Body>
void on_every_target(Body&& body) {
  for (const std::string& target : cpu::supported_targets()) {
    SCOPED_TRACE(target);
    cpu::use_target(target);
    ASSERT_EQ(target, cpu::target_name());
    body();
    cpu::use_target("");
  }
}

template <class T>
T get(const void* row, std::int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(row) + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}
template <class T>
void put(void* row, std::int64_t i, T value) {
  std::memcpy(static_cast<std::byte*>(row) + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
}

inline const SmallFloat& definition_of(Dtype dtype) { return dtype == Dtype::bfloat16 ? SmallFloat::bfloat16() : SmallFloat::float16(); }

// Exact: every element is a double.
inline double read_element(Dtype dtype, const void* row, std::int64_t i) {
  if (dtype == Dtype::float64) return get<double>(row, i);
  if (dtype == Dtype::float32) return get<float>(row, i);
  return definition_of(dtype).decode(get<std::uint16_t>(row, i));
}

// Rounds once.
inline void write_element(Dtype dtype, void* row, std::int64_t i, double value) {
  if (dtype == Dtype::float64) return put(row, i, std::isnan(value) ? std::bit_cast<double>(INT64_MAX) : value);
  if (dtype == Dtype::float32) return put(row, i, std::isnan(value) ? std::bit_cast<float>(INT32_MAX) : static_cast<float>(value));
  put(row, i, static_cast<std::uint16_t>(definition_of(dtype).encode(value)));
}

// Numbers of similar size (their sums tie and cancel), zeros of both signs, subnormals, the largest, infinities, NaN.
inline void fill_row(SeededRandom& random, Dtype dtype, void* row, std::int64_t elements) {
  const bool with_specials = random.one_in(2);
  for (std::int64_t i = 0; i < elements; ++i) {
    const double small = static_cast<double>(random.between(-512, 512)) / 256;
    const double specials[] = {0.0, -0.0, 1e-40, -6e-8, 3.4e38, -65504, 65519, INFINITY, -INFINITY, NAN};
    if (random.one_in(8)) {  // any bits
      const std::uint64_t bits = random();
      const int size = size_of(dtype);
      std::memcpy(static_cast<std::byte*>(row) + i * size, &bits, size);
      if (with_specials || std::isfinite(read_element(dtype, row, i))) continue;
    }
    write_element(dtype, row, i, with_specials && random.one_in(4) ? random.pick(specials) : small);
  }
}

inline void expect_same_elements(Dtype dtype, const void* expected, const void* actual, std::int64_t elements) {
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  for (std::int64_t i = 0; i < elements; ++i) {
    const auto at = [&](const void* row) { return static_cast<const std::byte*>(row) + i * size; };
    ASSERT_EQ(0, std::memcmp(at(expected), at(actual), size))
        << name(dtype) << " element " << i << " of " << elements << ": expected " << std::hexfloat << read_element(dtype, expected, i)
        << ", got " << read_element(dtype, actual, i);
  }
}

constexpr Dtype kSummable[] = {Dtype::float64, Dtype::float32, Dtype::bfloat16, Dtype::float16};
// Around the lengths of vectors and blocks.
constexpr std::int64_t kLengths[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 300, 384, 1031};

}  // namespace tokenyard::testing
