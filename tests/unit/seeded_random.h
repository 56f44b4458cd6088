#pragma once
// Random numbers whose seed is printed by the test that fails; TOKENYARD_SEED replays it.

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

namespace tokenyard::testing {

class SeededRandom {
 public:
  using result_type = std::uint64_t;
  static constexpr result_type min() { return std::mt19937_64::min(); }
  static constexpr result_type max() { return std::mt19937_64::max(); }
  result_type operator()() { return engine_(); }

  // In [low, high].
  std::int64_t between(std::int64_t low, std::int64_t high) { return std::uniform_int_distribution<std::int64_t>(low, high)(engine_); }
  bool one_in(int n) { return between(1, n) == 1; }
  template <class T, std::size_t kSize>
  T pick(const T (&values)[kSize]) {
    return values[between(0, kSize - 1)];
  }

 private:
  static std::uint64_t seed() {
    const char* given = std::getenv("TOKENYARD_SEED");
    return given ? std::strtoull(given, nullptr, 10) : std::random_device()();
  }
  std::uint64_t seed_ = seed();
  ::testing::ScopedTrace trace_{__FILE__, __LINE__, "TOKENYARD_SEED=" + std::to_string(seed_) + " replays this"};
  std::mt19937_64 engine_{seed_};
};

}  // namespace tokenyard::testing
