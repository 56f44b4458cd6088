#pragma once
// One dense float32 matrix product.

#include <cstdint>

namespace tokenyard::experts_internal {

// A row-major matrix whose rows are `stride` elements apart; transposed: the product takes it so.
struct Matrix {
  const float* data = nullptr;
  std::int64_t stride = 0;
  bool transposed = false;
};
struct Product {
  std::int64_t m = 0, n = 0, k = 0;
  Matrix a;  // [m,k] after transposition
  Matrix b;  // [k,n] after transposition
  bool accumulate = false;
  float* c = nullptr;  // [m,n]
  std::int64_t c_stride = 0;
};
// Nothing for an empty c; a zero or unchanged c for k = 0.
void multiply(const Product& product);

}  // namespace tokenyard::experts_internal
