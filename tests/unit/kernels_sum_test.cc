// fold, reduce and scale_row against loops over single elements.

#include <memory>

#include "kernel_rows.h"

namespace tokenyard::cpu {
namespace {

using testing::GuardedRow;
using testing::read_element;
using testing::SeededRandom;
using testing::write_element;

struct Rows {
  Rows(SeededRandom& random, int count, Dtype dtype, std::int64_t elements) {
    for (int i = 0; i < count; ++i) {
      owned.push_back(std::make_unique<GuardedRow>(random, elements * size_of(dtype)));
      testing::fill_row(random, dtype, owned.back()->data(), elements);
      pointers.push_back(owned.back()->data());
    }
  }
  std::vector<std::unique_ptr<GuardedRow>> owned;
  std::vector<const void*> pointers;
};

// float32 additions, unless elements are float64.
struct Adder {
  Dtype dtype;
  bool wide() const { return dtype == Dtype::float64; }
  double add(double a, double b) const { return wide() ? a + b : static_cast<float>(a) + static_cast<float>(b); }
  double multiply(double a, double b) const { return wide() ? a * b : static_cast<float>(a) * static_cast<float>(b); }
  double fma(double a, double b, double c) const {
    return wide() ? std::fma(a, b, c) : std::fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
  }
  double rounded(double value) const {
    std::uint64_t element;
    write_element(dtype, &element, 0, value);
    return read_element(dtype, &element, 0);
  }
};

double folded(const FoldArgs& args, std::int64_t i) {
  const Adder adder{args.dtype};
  double sum = 0;
  for (int r = 0; r < args.count; ++r) {
    const double x = read_element(args.dtype, args.rows[r], i);
    sum = args.weights ? adder.fma(args.weights[r], x, sum) : adder.add(sum, x);
  }
  return sum;
}

double reduced(const ReduceArgs& args, std::int64_t i) {
  const Adder adder{args.dtype};
  const auto read = [&](const void* row) { return row ? read_element(args.dtype, row, i) : 0.0; };
  double sum = adder.add(read(args.bias0), read(args.bias1));
  if (!args.group_ends) {
    for (int p = 0; p < args.count; ++p) sum = adder.add(sum, read(args.partials[p]));
    return sum;
  }
  for (int g = 0; g < args.num_groups; ++g) {
    double group = 0;
    for (int p = g == 0 ? 0 : args.group_ends[g - 1]; p < args.group_ends[g]; ++p) group = adder.add(group, read(args.partials[p]));
    sum = adder.add(sum, adder.rounded(group));
  }
  return sum;
}

template <class Value>
std::vector<std::byte> expected_row(Dtype dtype, std::int64_t elements, Value&& value) {
  std::vector<std::byte> row(elements * size_of(dtype));
  for (std::int64_t i = 0; i < elements; ++i) write_element(dtype, row.data(), i, value(i));
  return row;
}

float random_weight(SeededRandom& random) {
  const float specials[] = {0.0f, -0.0f, 1.0f, 1e-30f, 3e38f, INFINITY, NAN};
  return random.one_in(10) ? random.pick(specials) : static_cast<float>(random.between(-1000, 1000)) / 999;
}

TEST(KernelsFold, AnyRowsWeightsAndLength) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 300; ++repeat) {
      FoldArgs args{.dtype = random.pick(testing::kSummable), .elements = random.pick(testing::kLengths), .stream = random.one_in(2)};
      args.count = static_cast<int>(random.between(0, 9));
      const Rows rows(random, args.count, args.dtype, args.elements);
      args.rows = rows.pointers.data();
      std::vector<float> weights(args.count);
      for (float& weight : weights) weight = random_weight(random);
      if (args.count > 0 && random.one_in(2)) args.weights = weights.data();
      const auto expected = expected_row(args.dtype, args.elements, [&](std::int64_t i) { return folded(args, i); });
      const GuardedRow out(random, expected.size());
      // In place now and then.
      const GuardedRow& target = args.count > 0 && random.one_in(4) ? *rows.owned[random.between(0, args.count - 1)] : out;
      args.out = target.data();
      fold(args);
      testing::expect_same_elements(args.dtype, expected.data(), args.out, args.elements);
      ASSERT_TRUE(target.untouched_outside()) << name(args.dtype) << " x " << args.elements;
    }
  });
}

TEST(KernelsFold, NoRowsGivePlusZero) {
  testing::on_every_target([] {
    for (const Dtype dtype : testing::kSummable) {
      std::vector<unsigned char> out(5 * size_of(dtype), 0xff);
      fold({.dtype = dtype, .elements = 5, .out = out.data()});
      EXPECT_EQ(std::vector<unsigned char>(out.size(), 0), out);
    }
  });
}

TEST(KernelsFold, MultiplyAddIsFused) {
  testing::on_every_target([] {
    // (1 + 2^-12)^2 - 1 = 2^-11 + 2^-24: a rounded product loses the last term.
    const float x = 1 + std::ldexp(1.0f, -12), minus_one = -1;
    const void* rows[] = {&minus_one, &x};
    const float weights[] = {1, x};
    float out = 0;
    fold({.rows = rows, .weights = weights, .count = 2, .dtype = Dtype::float32, .elements = 1, .out = &out});
    EXPECT_EQ(std::ldexp(1.0f, -11) + std::ldexp(1.0f, -24), out);
  });
}

TEST(KernelsReduce, AnyPartialsGroupsBiasesTypesAndLength) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 600; ++repeat) {
      ReduceArgs args{.dtype = random.pick(testing::kSummable), .elements = random.pick(testing::kLengths), .stream = random.one_in(2)};
      args.out_dtype = random.one_in(2) ? args.dtype : random.pick(testing::kSummable);
      args.count = static_cast<int>(random.between(0, 9));
      const Rows partials(random, args.count, args.dtype, args.elements);
      const Rows biases(random, 2, args.dtype, args.elements);
      args.partials = partials.pointers.data();
      if (random.one_in(3)) args.bias0 = biases.pointers[0];
      if (random.one_in(3)) args.bias1 = biases.pointers[1];
      std::vector<int> ends;  // empty groups too
      for (int g = static_cast<int>(random.between(0, 4)); g > 0; --g) ends.push_back(static_cast<int>(random.between(0, args.count)));
      ends.push_back(args.count);
      std::sort(ends.begin(), ends.end());
      if (random.one_in(2)) {
        args.group_ends = ends.data();
        args.num_groups = static_cast<int>(ends.size());
      }
      const auto expected = expected_row(args.out_dtype, args.elements, [&](std::int64_t i) { return reduced(args, i); });
      const GuardedRow out(random, expected.size());
      args.out = out.data();
      reduce(args);
      stream_fence();
      SCOPED_TRACE(std::string(name(args.dtype)) + (args.group_ends ? " in groups" : " flat"));
      testing::expect_same_elements(args.out_dtype, expected.data(), args.out, args.elements);
      ASSERT_TRUE(out.untouched_outside()) << name(args.out_dtype) << " x " << args.elements;
    }
  });
}

TEST(KernelsReduce, AGroupIsRoundedBeforeItIsAdded) {
  testing::on_every_target([] {
    // In bfloat16 1 + 2^-8 rounds to 1; in float32 two of them with 2^-8 in the first partial would be 1 + 2^-7.
    const auto bits = [](float value) { return float_to_bfloat16(value); };
    const std::uint16_t one = bits(1), tiny = bits(std::ldexp(1.0f, -8));
    const void* partials[] = {&one, &tiny, &tiny};
    const int ends[] = {2, 3};
    std::uint16_t out = 0;
    ReduceArgs args{.partials = partials, .count = 3, .dtype = Dtype::bfloat16, .out_dtype = Dtype::bfloat16, .elements = 1, .out = &out};
    reduce(args);
    EXPECT_EQ(bits(1 + std::ldexp(1.0f, -7)), out);
    args.group_ends = ends;
    args.num_groups = 2;
    reduce(args);
    EXPECT_EQ(one, out);
  });
}

// Every pattern of a narrow type through the vector conversions, and every place where they round.
TEST(KernelsReduce, ConvertsEveryNarrowPattern) {
  testing::on_every_target([] {
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
      std::vector<std::uint16_t> patterns(65536);
      for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
      std::vector<float> values(patterns.size());
      const void* partials[] = {patterns.data()};
      const auto elements = static_cast<std::int64_t>(patterns.size());
      reduce({.partials = partials, .count = 1, .dtype = dtype, .out_dtype = Dtype::float32, .elements = elements, .out = values.data()});
      // The sum starts at +0, which takes the sign of -0.
      const auto value = [&](std::int64_t i) { return 0.0 + read_element(dtype, patterns.data(), i); };
      const auto expected = expected_row(Dtype::float32, elements, value);
      testing::expect_same_elements(Dtype::float32, expected.data(), values.data(), elements);
    }
  });
}

TEST(KernelsReduce, RoundsToEveryNarrowNumberAndAtEveryMidpoint) {
  testing::on_every_target([] {
    for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
      std::vector<float> values;
      const auto& numbers = testing::definition_of(dtype).numbers();
      for (std::size_t i = 0; i + 1 < numbers.size(); ++i) {
        const auto number = static_cast<float>(numbers[i]), midpoint = static_cast<float>((numbers[i] + numbers[i + 1]) / 2);
        for (const float value : {number, std::nextafter(midpoint, 0.0f), midpoint, std::nextafter(midpoint, INFINITY)}) {
          values.push_back(value);
          values.push_back(-value);
        }
      }
      for (const float value : {65519.99f, 65520.0f, 3.3961775e38f, 3.3961776e38f, INFINITY, NAN}) values.push_back(value);
      std::vector<std::uint16_t> patterns(values.size());
      const void* partials[] = {values.data()};
      const auto elements = static_cast<std::int64_t>(values.size());
      reduce({.partials = partials, .count = 1, .dtype = Dtype::float32, .out_dtype = dtype, .elements = elements, .out = patterns.data()});
      const auto expected = expected_row(dtype, elements, [&](std::int64_t i) { return 0.0 + values[i]; });
      testing::expect_same_elements(dtype, expected.data(), patterns.data(), elements);
    }
  });
}

TEST(KernelsReduce, Float64RoundsOnceToTheNarrowTypes) {
  testing::on_every_target([] {
    // Next to a midpoint of bfloat16 and float16: by way of float32 it would become the midpoint, then the even neighbour.
    const double bit = std::ldexp(1.0, -40);
    const std::pair<Dtype, double> midpoints[] = {{Dtype::bfloat16, 1 + std::ldexp(1.0, -8)}, {Dtype::float16, 1 + std::ldexp(1.0, -11)}};
    for (const auto& [dtype, midpoint] : midpoints) {
      for (const double value : {midpoint + bit, midpoint, midpoint - bit, -midpoint - bit, 65520 - bit, 1e300, 1e-300, -1e-300}) {
        const void* partials[] = {&value};
        std::uint16_t out = 0, expected = 0;
        reduce({.partials = partials, .count = 1, .dtype = Dtype::float64, .out_dtype = dtype, .elements = 1, .out = &out});
        write_element(dtype, &expected, 0, value);
        EXPECT_EQ(expected, out) << name(dtype) << " " << std::hexfloat << value;
      }
    }
  });
}

TEST(KernelsScaleRow, TwoRoundingsAnyLengthInPlaceToo) {
  SeededRandom random;
  testing::on_every_target([&] {
    for (int repeat = 0; repeat < 200; ++repeat) {
      const Dtype dtype = random.pick(testing::kSummable);
      const std::int64_t elements = random.pick(testing::kLengths);
      const Rows rows(random, 1, dtype, elements);
      const float weight = random_weight(random);
      const auto expected = expected_row(
          dtype, elements, [&](std::int64_t i) { return Adder{dtype}.multiply(weight, read_element(dtype, rows.pointers[0], i)); });
      const GuardedRow out(random, expected.size());
      const GuardedRow& target = random.one_in(2) ? *rows.owned[0] : out;
      scale_row(target.data(), rows.pointers[0], weight, dtype, elements);
      testing::expect_same_elements(dtype, expected.data(), target.data(), elements);
      ASSERT_TRUE(target.untouched_outside());
    }
  });
}

}  // namespace
}  // namespace tokenyard::cpu
