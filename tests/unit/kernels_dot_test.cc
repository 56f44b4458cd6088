#include "kernel_rows.h"

namespace tokenyard::cpu {
namespace {

using testing::GuardedRow;
using testing::read_element;
using testing::SeededRandom;

// The definition in kernels.h, word for word.
template <class Sum>
float naive_dot(const void* a, const void* b, Dtype dtype, std::int64_t elements) {
  Sum lanes[16] = {};
  for (std::int64_t i = 0; i < elements; ++i) {
    const auto x = static_cast<Sum>(read_element(dtype, a, i)), y = static_cast<Sum>(read_element(dtype, b, i));
    lanes[i % 16] = std::fma(x, y, lanes[i % 16]);
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  }
  return static_cast<float>(lanes[0]);
}

void expect_same_float(float expected, float actual) {
  if (std::isnan(expected)) {
    ASSERT_TRUE(std::isnan(actual));
  } else {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(expected), std::bit_cast<std::uint32_t>(actual)) << expected << " " << actual;
  }
}

TEST(KernelsDot, AnyTypeAndLength) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 300; ++repeat) {
      const Dtype dtype = random.pick(testing::kSummable);
      const std::int64_t elements = random.pick(testing::kLengths);
      const std::size_t bytes = elements * size_of(dtype);
      const GuardedRow a(random, bytes), b(random, bytes);
      testing::fill_row(random, dtype, a.data(), elements);
      testing::fill_row(random, dtype, b.data(), elements);
      const float expected = dtype == Dtype::float64 ? naive_dot<double>(a.data(), b.data(), dtype, elements)
                                                     : naive_dot<float>(a.data(), b.data(), dtype, elements);
      SCOPED_TRACE(std::string(name(dtype)) + " x " + std::to_string(elements));
      expect_same_float(expected, dot(a.data(), b.data(), dtype, elements));
    }
  });
}

TEST(KernelsDot, NothingIsPlusZeroAndAnUnderflowKeepsItsSign) {
  testing::on_every_target([] {
    expect_same_float(0.0f, dot(nullptr, nullptr, Dtype::float32, 0));
    // All lanes end as -0, and the last is followed by no padding that would make it +0.
    const std::vector<float> a(16 + 15, -1e-30f), b(16 + 15, 1e-30f);
    expect_same_float(-0.0f, dot(a.data(), b.data(), Dtype::float32, 31));
  });
}

}  // namespace
}  // namespace tokenyard::cpu
