// Conversions against the definition of each format, for every pattern and around every place where rounding changes.

#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <limits>

#include "seeded_random.h"
#include "small_float.h"
#include "tokenyard/dtype.h"

namespace tokenyard {
namespace {

using testing::SeededRandom;
using testing::SmallFloat;

struct Format {
  const char* name;
  const SmallFloat& definition;
  std::function<float(std::uint32_t)> decode;
  std::function<std::uint32_t(float)> encode;
};

void PrintTo(const Format& format, std::ostream* out) { *out << format.name; }

class DtypeConversion : public ::testing::TestWithParam<Format> {};

float from_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }

TEST_P(DtypeConversion, DecodesEveryPattern) {
  const auto& [name, definition, decode, encode] = GetParam();
  for (std::uint32_t pattern = 0; pattern < 2 * definition.sign_bit(); ++pattern) {
    const double expected = definition.decode(pattern);
    const float value = decode(pattern);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << pattern;
    } else {
      ASSERT_EQ(expected, value) << pattern;
      ASSERT_EQ(std::signbit(expected), std::signbit(value)) << pattern;
    }
  }
}

TEST_P(DtypeConversion, EveryPatternSurvivesTheWayThere) {
  const auto& [name, definition, decode, encode] = GetParam();
  for (std::uint32_t pattern = 0; pattern < 2 * definition.sign_bit(); ++pattern) {
    ASSERT_EQ(definition.is_nan(pattern) ? definition.nan() : pattern, encode(decode(pattern))) << pattern;
  }
}

TEST_P(DtypeConversion, RoundsToNearestEvenAroundEveryNumberAndMidpoint) {
  const auto& [name, definition, decode, encode] = GetParam();
  const auto& numbers = definition.numbers();
  const auto check_around = [&, &definition = definition, &encode = encode](double centre) {
    const auto bits = static_cast<std::int64_t>(std::bit_cast<std::uint32_t>(static_cast<float>(centre)));
    for (std::int64_t near = bits - 2; near <= bits + 2; ++near) {
      if (near < 0 || near > 0x7f800000) continue;
      for (const std::uint32_t sign : {0u, 0x80000000u}) {
        const float value = from_bits(static_cast<std::uint32_t>(near) | sign);
        ASSERT_EQ(definition.encode(value), encode(value)) << std::hexfloat << value;
      }
    }
  };
  for (std::size_t i = 0; i + 1 < numbers.size(); ++i) {
    check_around(numbers[i]);
    check_around((numbers[i] + numbers[i + 1]) / 2);
  }
  const double largest = numbers.back();
  check_around(largest);
  check_around(largest + (largest - numbers[numbers.size() - 2]) / 2);
  check_around(std::numeric_limits<float>::max());
}

TEST_P(DtypeConversion, AnyFloat) {
  const auto& [name, definition, decode, encode] = GetParam();
  SeededRandom random;
  for (int i = 0; i < 500'000; ++i) {
    const float value = from_bits(static_cast<std::uint32_t>(random()));
    ASSERT_EQ(definition.encode(value), encode(value)) << std::hexfloat << value;
  }
}

TEST_P(DtypeConversion, EveryNanIsTheSameNan) {
  const auto& [name, definition, decode, encode] = GetParam();
  // Payloads that would round up into the sign, or be cut off to leave an infinity.
  for (const std::uint32_t bits : {0x7f800001u, 0x7f807fffu, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc00000u, 0xffff8000u, 0xffffffff}) {
    EXPECT_EQ(definition.nan(), encode(from_bits(bits))) << bits;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Formats, DtypeConversion,
    ::testing::Values(Format{"bfloat16", SmallFloat::bfloat16(),
                             [](std::uint32_t bits) { return bfloat16_to_float(static_cast<std::uint16_t>(bits)); }, float_to_bfloat16},
                      Format{"float16", SmallFloat::float16(),
                             [](std::uint32_t bits) { return float16_to_float(static_cast<std::uint16_t>(bits)); }, float_to_float16},
                      Format{"float8_e4m3", SmallFloat::float8_e4m3(),
                             [](std::uint32_t bits) { return float8_e4m3_to_float(static_cast<std::uint8_t>(bits)); },
                             float_to_float8_e4m3}),
    [](const auto& info) { return info.param.name; });

TEST(DtypeConversionKnown, Values) {
  EXPECT_EQ(0x3f80, float_to_bfloat16(1.0f));
  EXPECT_EQ(0x7f80, float_to_bfloat16(std::numeric_limits<float>::max()));
  EXPECT_EQ(0x3c00, float_to_float16(1.0f));
  EXPECT_EQ(0x7bff, float_to_float16(65519.0f));
  EXPECT_EQ(0xfc00, float_to_float16(-65520.0f));
  EXPECT_EQ(0x0001, float_to_float16(std::ldexp(1.0f, -24)));
  EXPECT_EQ(0x38, float_to_float8_e4m3(1.0f));
  EXPECT_EQ(0x7e, float_to_float8_e4m3(448.0f));
  EXPECT_EQ(0xfe, float_to_float8_e4m3(-1e30f));
  EXPECT_EQ(0x7f, float_to_float8_e4m3(INFINITY));
}

TEST(DtypeUe8m0, DecodesEveryPattern) {
  for (int bits = 0; bits < 255; ++bits) EXPECT_EQ(std::ldexp(1.0, bits - 127), ue8m0_to_float(static_cast<std::uint8_t>(bits)));
  EXPECT_TRUE(std::isnan(ue8m0_to_float(0xff)));
}

TEST(DtypeUe8m0, CeilingIsTheSmallestPowerNotBelow) {
  const auto reference = [](float value) -> int {
    if (!(value > 0) || value > std::ldexp(1.0f, 127)) return 0xff;
    int bits = 0;
    while (std::ldexp(1.0, bits - 127) < value) ++bits;
    return bits;
  };
  SeededRandom random;
  for (int i = 0; i < 20'000; ++i) {
    const float value = from_bits(static_cast<std::uint32_t>(random()));
    ASSERT_EQ(reference(value), float_to_ue8m0_ceil(value)) << std::hexfloat << value;
  }
  for (int exponent = -149; exponent <= 127; ++exponent) {
    const float power = std::ldexp(1.0f, exponent);
    for (const float value : {std::nextafter(power, 0.0f), power, std::nextafter(power, INFINITY)}) {
      ASSERT_EQ(reference(value), float_to_ue8m0_ceil(value)) << std::hexfloat << value;
    }
  }
  for (const float value : {0.0f, -0.0f, -1.0f, INFINITY, -INFINITY, NAN}) EXPECT_EQ(0xff, float_to_ue8m0_ceil(value)) << value;
}

}  // namespace
}  // namespace tokenyard
