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

// Line by line to all targets: one read of `from`, ahead of which the next rows are fetched, and more stores under way than a copy
// after the other has. kStream: whole lines, and targets that lie on lines.
template <bool kStream>
void spread_lines(void* const* to, int count, const void* from, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  constexpr std::size_t kAhead = 16 * kLine;
  const hn::CappedTag<std::uint8_t, kLine> d;
  const auto* in = static_cast<const std::uint8_t*>(from);
  std::size_t i = 0;
  for (; i + kLine <= bytes; i += kLine) {
    hwy::Prefetch(in + i + kAhead);
    for (std::size_t j = i; j < i + kLine; j += hn::Lanes(d)) {
      const auto part = hn::LoadU(d, in + j);
      for (int t = 0; t < count; ++t) {
        auto* const out = static_cast<std::uint8_t*>(to[t]) + j;
        if constexpr (kStream) {
          hn::Stream(part, d, out);
        } else {
          hn::StoreU(part, d, out);
        }
      }
    }
  }
  for (int t = 0; i < bytes && t < count; ++t) std::memcpy(static_cast<std::uint8_t*>(to[t]) + i, in + i, bytes - i);
}
void stream_lines(void* const* to, int count, const void* from, std::size_t bytes) { spread_lines<true>(to, count, from, bytes); }
void store_lines(void* const* to, int count, const void* from, std::size_t bytes) { spread_lines<false>(to, count, from, bytes); }

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace tokenyard::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tokenyard::cpu {

HWY_EXPORT(stream_row);
HWY_EXPORT(stream_lines);
HWY_EXPORT(store_lines);
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
  if (!stream) {
    HWY_DYNAMIC_DISPATCH(store_lines)(to, count, from, bytes);
    return;
  }
  // The first copy brings the row into the cache, where the others find it: streamed stores leave it there.
  for (int i = 0; i < count; ++i) copy_row(to[i], from, bytes, stream);
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
