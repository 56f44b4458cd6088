// quantise_row and dequantise_row against the formulas of tokenyard/quantise.h, element by element.

#include "kernel_rows.h"

namespace tokenyard::cpu {
namespace {

using testing::get;
using testing::GuardedRow;
using testing::put;
using testing::read_element;
using testing::SeededRandom;
using testing::SmallFloat;

constexpr Dtype kWide[] = {Dtype::bfloat16, Dtype::float16, Dtype::float32};
constexpr ScaleFormat kFormats[] = {ScaleFormat::float32, ScaleFormat::float32_pow2, ScaleFormat::ue8m0};

struct Quantised {
  std::vector<std::uint8_t> q;
  std::vector<float> scales;
};

Quantised naive_quantise(Dtype dtype, const void* x, std::int64_t elements, ScaleFormat format) {
  Quantised result;
  for (std::int64_t begin = 0; begin < elements; begin += 128) {
    const std::int64_t end = std::min<std::int64_t>(begin + 128, elements);
    const auto element = [&](std::int64_t i) { return static_cast<float>(read_element(dtype, x, i)); };
    float amax = 1e-4f;
    for (std::int64_t i = begin; i < end; ++i) {
      if (std::isfinite(element(i))) amax = std::max(amax, std::fabs(element(i)));
    }
    float scale = amax / 448.0f;
    if (format != ScaleFormat::float32) {
      int exponent = -126;
      while (std::ldexp(1.0f, exponent) < scale) ++exponent;
      scale = std::ldexp(1.0f, exponent);
    }
    result.scales.push_back(scale);
    for (std::int64_t i = begin; i < end; ++i) {
      const float scaled = format == ScaleFormat::float32 ? element(i) * (448.0f / amax) : element(i) / scale;
      result.q.push_back(static_cast<std::uint8_t>(SmallFloat::float8_e4m3().encode(scaled)));
    }
  }
  return result;
}

// Blocks of very different sizes, with zeros, infinities and NaN.
void fill_blocks(SeededRandom& random, Dtype dtype, void* x, std::int64_t elements) {
  testing::fill_row(random, dtype, x, elements);
  for (std::int64_t begin = 0; begin < elements; begin += 128) {
    if (random.one_in(3)) continue;
    const double magnitude = std::ldexp(1.0, static_cast<int>(random.between(-30, 14)));
    for (std::int64_t i = begin; i < std::min<std::int64_t>(begin + 128, elements); ++i) {
      testing::write_element(dtype, x, i, magnitude * static_cast<double>(random.between(-1000, 1000)) / 999);
    }
  }
}

std::size_t scale_bytes(std::int64_t elements, ScaleFormat format, std::int64_t stride) {
  const std::int64_t columns = scale_columns(elements, format);
  return columns == 0 ? 0 : static_cast<std::size_t>((columns - 1) * stride + 4);
}

float read_scale(const std::byte* scales, std::int64_t block, ScaleFormat format, std::int64_t stride) {
  if (format != ScaleFormat::ue8m0) return get<float>(scales + block * stride, 0);
  return ue8m0_to_float(get<std::uint8_t>(scales + block / 4 * stride, block % 4));
}

TEST(QuantiseRow, AnyTypeFormatLengthAndStride) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 300; ++repeat) {
      const Dtype dtype = random.pick(kWide);
      const ScaleFormat format = random.pick(kFormats);
      const std::int64_t elements = random.pick(testing::kLengths);
      const std::int64_t strides[] = {4, 8, 20};
      const std::int64_t stride = random.pick(strides);
      const GuardedRow x(random, elements * size_of(dtype)), q(random, elements), scales(random, scale_bytes(elements, format, stride));
      fill_blocks(random, dtype, x.data(), elements);
      const Quantised expected = naive_quantise(dtype, x.data(), elements, format);
      quantise_row({.x = x.data(),
                    .dtype = dtype,
                    .elements = elements,
                    .format = format,
                    .q = reinterpret_cast<std::uint8_t*>(q.data()),
                    .scales = scales.data(),
                    .scale_stride = stride});
      for (std::int64_t i = 0; i < elements; ++i) {
        ASSERT_EQ(expected.q[i], get<std::uint8_t>(q.data(), i)) << name(dtype) << " " << i << ": " << read_element(dtype, x.data(), i);
      }
      for (std::size_t b = 0; b < expected.scales.size(); ++b) {
        ASSERT_EQ(expected.scales[b], read_scale(scales.data(), static_cast<std::int64_t>(b), format, stride)) << b;
      }
      if (format == ScaleFormat::ue8m0) {  // bytes without a block are zero
        for (auto b = static_cast<std::int64_t>(expected.scales.size()); b % 4 != 0; ++b) {
          ASSERT_EQ(0, get<std::uint8_t>(scales.data() + b / 4 * stride, b % 4));
        }
      }
      ASSERT_TRUE(q.untouched_outside() && scales.untouched_outside());
    }
  });
}

TEST(QuantiseRow, BytesBetweenScalesStayAsTheyAre) {
  testing::on_every_target([] {
    const std::vector<float> x(3 * 128, 1.0f);
    std::vector<std::uint8_t> q(x.size());
    std::vector<std::uint32_t> scales(6, 0xabababab);
    quantise_row({.x = x.data(),
                  .elements = static_cast<std::int64_t>(x.size()),
                  .q = q.data(),
                  .scales = reinterpret_cast<std::byte*>(scales.data()),
                  .scale_stride = 8});
    for (const int i : {1, 3, 5}) EXPECT_EQ(0xabababab, scales[i]);
    for (const int i : {0, 2, 4}) EXPECT_EQ(1.0f / 448, std::bit_cast<float>(scales[i]));
  });
}

TEST(QuantiseRow, RoundsToEveryE4m3NumberAndAtEveryMidpoint) {
  testing::on_every_target([] {
    // 448 in each block makes the factor 1.
    std::vector<float> x;
    const auto& numbers = SmallFloat::float8_e4m3().numbers();
    for (std::size_t i = 0; i + 1 < numbers.size(); ++i) {
      const auto number = static_cast<float>(numbers[i]), midpoint = static_cast<float>((numbers[i] + numbers[i + 1]) / 2);
      for (const float value : {number, std::nextafter(midpoint, 0.0f), midpoint, std::nextafter(midpoint, 448.0f)}) {
        for (const float sign : {1.0f, -1.0f}) {
          if (x.size() % 128 == 0) x.push_back(448.0f);
          x.push_back(sign * value);
        }
      }
    }
    std::vector<std::uint8_t> q(x.size());
    std::vector<float> scales(x.size() / 128 + 1);
    quantise_row({.x = x.data(),
                  .elements = static_cast<std::int64_t>(x.size()),
                  .q = q.data(),
                  .scales = reinterpret_cast<std::byte*>(scales.data())});
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_EQ(SmallFloat::float8_e4m3().encode(x[i]), q[i]) << std::hexfloat << x[i];
  });
}

TEST(QuantiseRow, InfinityAndNanBecomeNanAndDoNotTouchTheScale) {
  testing::on_every_target([] {
    std::vector<float> x(128, 0.5f);
    x[3] = INFINITY;
    x[4] = -INFINITY;
    x[5] = NAN;
    x[6] = 2.0f;
    std::vector<std::uint8_t> q(x.size());
    float scale = 0;
    quantise_row({.x = x.data(), .elements = 128, .q = q.data(), .scales = reinterpret_cast<std::byte*>(&scale)});
    EXPECT_EQ(2.0f / 448, scale);
    for (const int i : {3, 4, 5}) EXPECT_EQ(0x7f, q[i]) << i;
    EXPECT_EQ(0x7e, q[6]);
    EXPECT_EQ(0x6e, q[0]);  // 112
  });
}

TEST(DequantiseRow, AnyPatternTypeFormatLengthAndStride) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 300; ++repeat) {
      const Dtype dtype = random.pick(kWide);
      const ScaleFormat format = random.pick(kFormats);
      const std::int64_t elements = random.pick(testing::kLengths);
      const std::int64_t strides[] = {4, 8, 20};
      const std::int64_t stride = random.pick(strides);
      const GuardedRow q(random, elements), scales(random, scale_bytes(elements, format, stride)), x(random, elements * size_of(dtype));
      for (std::int64_t i = 0; i < elements; ++i) put(q.data(), i, static_cast<std::uint8_t>(random()));
      for (std::int64_t b = 0; b < (elements + 127) / 128; ++b) {
        if (format == ScaleFormat::ue8m0) {
          put(scales.data() + b / 4 * stride, b % 4, static_cast<std::uint8_t>(random()));
        } else {
          const auto exponent = static_cast<int>(random.between(-60, 60));
          put(scales.data() + b * stride, 0, std::ldexp(static_cast<float>(random.between(1, 1 << 20)), exponent));
        }
      }
      dequantise_row({.q = reinterpret_cast<const std::uint8_t*>(q.data()),
                      .scales = scales.data(),
                      .scale_stride = stride,
                      .format = format,
                      .elements = elements,
                      .x = x.data(),
                      .dtype = dtype});
      std::vector<std::byte> expected(x.bytes());
      for (std::int64_t i = 0; i < elements; ++i) {
        const auto value = static_cast<float>(SmallFloat::float8_e4m3().decode(get<std::uint8_t>(q.data(), i)));
        testing::write_element(dtype, expected.data(), i, value * read_scale(scales.data(), i / 128, format, stride));
      }
      testing::expect_same_elements(dtype, expected.data(), x.data(), elements);
      ASSERT_TRUE(x.untouched_outside());
    }
  });
}

}  // namespace
}  // namespace tokenyard::cpu
