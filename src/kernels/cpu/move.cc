// Copies of rows, past the caches where the caller asks for it.

#include <algorithm>
#include <cstring>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/move.cc"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace tokenyard::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Non-temporal stores pay when they fill whole cache lines, so ordinary ones reach the first line and end the last.
void stream_row(void* to, const void* from, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  const hn::CappedTag<std::uint8_t, kLine> d;
  auto* out = static_cast<std::uint8_t*>(to);
  const auto* in = static_cast<const std::uint8_t*>(from);
  std::size_t i = -reinterpret_cast<std::uintptr_t>(out) % kLine;
  if (bytes < i + kLine) {
    std::memcpy(out, in, bytes);
    return;
  }
  std::memcpy(out, in, i);
  for (; i + kLine <= bytes; i += kLine) {
    for (std::size_t j = 0; j < kLine; j += hn::Lanes(d)) hn::Stream(hn::LoadU(d, in + i + j), d, out + i + j);
  }
  std::memcpy(out + i, in + i, bytes - i);
}

// Line by line past the caches to all targets that lie on lines: one read of `from`, ahead of which the next rows are fetched, and more
// stores under way than a copy after the other has.
void stream_lines(void* const* to, int count, const void* from, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  constexpr std::size_t kAhead = 16 * kLine;
  const hn::CappedTag<std::uint8_t, kLine> d;
  const auto* in = static_cast<const std::uint8_t*>(from);
  for (std::size_t i = 0; i < bytes; i += kLine) {
    hwy::Prefetch(in + i + kAhead);
    for (std::size_t j = i; j < i + kLine; j += hn::Lanes(d)) {
      const auto part = hn::LoadU(d, in + j);
      for (int t = 0; t < count; ++t) hn::Stream(part, d, static_cast<std::uint8_t*>(to[t]) + j);
    }
  }
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tokenyard::cpu {

HWY_EXPORT(stream_row);
HWY_EXPORT(stream_lines);
HWY_EXPORT(target_name);

void copy_row(void* to, const void* from, std::size_t bytes, bool stream) {
  if (stream) {
    HWY_DYNAMIC_DISPATCH(stream_row)(to, from, bytes);
  } else {
    std::memcpy(to, from, bytes);
  }
}

void copy_row_to_many(void* const* to, int count, const void* from, std::size_t bytes, bool stream) {
  const auto on_a_line = [](const void* row) { return reinterpret_cast<std::uintptr_t>(row) % 64 == 0; };
  if (stream && bytes % 64 == 0 && std::all_of(to, to + count, on_a_line)) {
    HWY_DYNAMIC_DISPATCH(stream_lines)(to, count, from, bytes);
    return;
  }
  // The first copy brings a piece into the cache, where the others find it. One target after the other: stores that alternate between
  // rows which no cache holds wait for each other, 24 us against 9 for 16 rows to two targets (AMD EPYC, rows in the last-level cache).
  constexpr std::size_t kPiece = 2048;
  for (std::size_t at = 0; at < bytes; at += kPiece) {
    for (int i = 0; i < count; ++i) {
      copy_row(static_cast<std::byte*>(to[i]) + at, static_cast<const std::byte*>(from) + at, std::min(kPiece, bytes - at), stream);
    }
  }
}

void stream_fence() { hwy::FlushStream(); }

const char* target_name() { return HWY_DYNAMIC_DISPATCH(target_name)(); }

std::vector<std::string> supported_targets() {
  std::vector<std::string> names;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) names.emplace_back(hwy::TargetName(target));
  return names;
}

void use_target(std::string_view name) {
  hwy::SetSupportedTargetsForTest(0);
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (name == hwy::TargetName(target)) hwy::SetSupportedTargetsForTest(target);
  }
}

}  // namespace tokenyard::cpu
#endif  // HWY_ONCE
