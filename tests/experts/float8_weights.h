#pragma once
// Experts in float8 with a scale for 128 x 128 elements, and the numbers that they stand for, by loops of its own.

#include <vector>

#include "tokenyard/dtype.h"
#include "tokenyard/experts.h"
#include "unit/seeded_random.h"

namespace tokenyard::testing {

// Matrices of one size; rows of all of them are counted on, [experts, projections, rows] say, and columns may end inside a block.
struct Float8Matrices {
  Float8Matrices(SeededRandom& random, std::int64_t of_count, std::int64_t of_rows, std::int64_t of_columns)
      : count(of_count), rows(of_rows), columns(of_columns) {
    for (std::int64_t i = 0; i < count * rows * columns; ++i)
      values.push_back(float_to_float8_e4m3(static_cast<float>(random.between(-1000, 1000)) / 4.0F));
    // Unlike each other, so that a scale that is another block's shows.
    for (std::int64_t i = 0; i < count * blocks(rows) * blocks(columns); ++i)
      scales.push_back(static_cast<float>(random.between(100, 1000)) / 1e6F);
  }
  static std::int64_t blocks(std::int64_t elements) { return (elements + 127) / 128; }
  float at(std::int64_t matrix, std::int64_t row, std::int64_t column) const {
    const std::int64_t block = (matrix * blocks(rows) + row / 128) * blocks(columns) + column / 128;
    return float8_e4m3_to_float(values[static_cast<std::size_t>((matrix * rows + row) * columns + column)]) *
           scales[static_cast<std::size_t>(block)];
  }
  std::vector<float> widened() const {
    std::vector<float> all;
    for (std::int64_t m = 0; m < count; ++m) {
      for (std::int64_t i = 0; i < rows * columns; ++i) all.push_back(at(m, i / columns, i % columns));
    }
    return all;
  }

  std::int64_t count, rows, columns;
  std::vector<std::uint8_t> values;
  std::vector<float> scales;
};

struct Float8Experts {
  Float8Experts(SeededRandom& random, std::int64_t of_experts, std::int64_t of_width, std::int64_t of_hidden)
      : experts(of_experts),
        width(of_width),
        hidden(of_hidden),
        w13(random, experts * 2, width, hidden),
        w2(random, experts, hidden, width) {}
  ExpertWeights views() const {
    using Blocks = Float8Matrices;
    ExpertWeights weights = {.w13 = {w13.values.data(), Dtype::float8_e4m3, {experts, 2, width, hidden}},
                             .w2 = {w2.values.data(), Dtype::float8_e4m3, {experts, hidden, width}}};
    weights.w13_scale = {w13.scales.data(), Dtype::float32, {experts, 2, Blocks::blocks(width), Blocks::blocks(hidden)}};
    weights.w2_scale = {w2.scales.data(), Dtype::float32, {experts, Blocks::blocks(hidden), Blocks::blocks(width)}};
    return weights;
  }
  std::int64_t experts, width, hidden;
  Float8Matrices w13, w2;
};

}  // namespace tokenyard::testing
