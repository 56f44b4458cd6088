#pragma once
// How a call's rows are stored where peers read them, be it peers' memory or what MPI sends from: ordinarily, or past the caches.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace tokenyard::exchange_internal {

// Ordinary stores win at some times, and at others take four times as long as stores past the caches (docs/performance.md):
// presumably where ranks' cores share no cache, and every line is fetched from another core before it is overwritten.
// Schedulers and hypervisors move ranks about, so both kinds are timed, the worse one now and then.
class StoreChoice {
 public:
  static constexpr int kSamples = 5;
  static constexpr int kProbeEvery = 64;

  // One call's stores, timed until destruction.
  class Stores {
   public:
    Stores(StoreChoice& choice, std::int64_t bytes)
        : choice_(choice), bytes_(bytes), is_large_(cpu::should_stream(bytes)), streams_(is_large_ || choice.next()) {}
    ~Stores() {
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin_;
      if (!is_large_ && bytes_ > 0) choice_.add(streams_, took.count() / static_cast<double>(bytes_));
    }
    Stores(const Stores&) = delete;
    Stores& operator=(const Stores&) = delete;

    bool stream_to_peers() const { return streams_; }
    // Rows that stay on their rank are in its caches when its experts come.
    bool stream_to_self() const { return is_large_; }

   private:
    StoreChoice& choice_;
    std::int64_t bytes_;
    bool is_large_;
    bool streams_;
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  };

  // Whether the next call streams.
  bool next() {
    if (std::min(count_[0], count_[1]) < kSamples) return count_[1] < count_[0];
    // Rows past the caches cost their reader a little more.
    constexpr double kMargin = 0.9;
    const bool better = median(true) < kMargin * median(false);
    return ++calls_ % kProbeEvery == 0 ? !better : better;
  }
  void add(bool streamed, double seconds_per_byte) { samples_[streamed][count_[streamed]++ % kSamples] = seconds_per_byte; }

 private:
  // A rank that loses its core meanwhile says nothing of its stores: the median of the last few.
  double median(bool streamed) const {
    std::array<double, kSamples> sorted = samples_[streamed];
    std::nth_element(sorted.begin(), sorted.begin() + kSamples / 2, sorted.end());
    return sorted[kSamples / 2];
  }

  std::array<std::array<double, kSamples>, 2> samples_{};  // [streamed], the last of each kind
  std::array<std::uint64_t, 2> count_{};
  std::uint64_t calls_ = 0;
};

}  // namespace tokenyard::exchange_internal
