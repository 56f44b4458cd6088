#include <gtest/gtest.h>

#include "expect_usage_error.h"
#include "tokenyard/dtype.h"

namespace tokenyard {
namespace {

struct Known {
  Dtype dtype;
  const char* name;
  const char* short_name;
  int size;
  bool summable;
};
constexpr Known kKnown[] = {
    {Dtype::float64, "float64", "f64", 8, true},
    {Dtype::float32, "float32", "f32", 4, true},
    {Dtype::bfloat16, "bfloat16", "bf16", 2, true},
    {Dtype::float16, "float16", "fp16", 2, true},
    {Dtype::float8_e4m3, "float8_e4m3", "fp8", 1, false},
    {Dtype::ue8m0, "ue8m0", "ue8m0", 1, false},
    {Dtype::int64, "int64", "i64", 8, false},
    {Dtype::int32, "int32", "i32", 4, false},
    {Dtype::uint8, "uint8", "u8", 1, false},
};

TEST(DtypeNames, EveryDtype) {
  for (const Known& known : kKnown) {
    EXPECT_EQ(known.name, name(known.dtype));
    EXPECT_EQ(known.dtype, parse_dtype(known.name));
    EXPECT_EQ(known.dtype, parse_dtype(known.short_name));
    EXPECT_EQ(known.size, size_of(known.dtype)) << known.name;
    EXPECT_EQ(known.summable, is_summable(known.dtype)) << known.name;
  }
}

TEST(DtypeNames, UnknownListsTheKnown) {
  testing::expect_usage_error([] { parse_dtype("float17"); }, {"dtype \"float17\"", "bfloat16", "fp8"});
  testing::expect_usage_error([] { parse_dtype(""); }, {"dtype \"\""});
  testing::expect_usage_error([] { parse_dtype("Float32"); }, {"Float32"});
}

}  // namespace
}  // namespace tokenyard
