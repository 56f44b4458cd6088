#pragma once
// Sums in rank order of one word of elements at a time: from +0, in float32 (float64 in float64), rounded once.

#include "kernels/cuda/numbers.cuh"

namespace tokenyard::cuda {

// One element, wherever it lies.
template <Dtype kDtype>
struct ElementSum {
  using Word = std::uint16_t;  // bfloat16, float16
  float sum = 0.0F;
  __device__ __forceinline__ void add(Word element) {
    float pair[2];
    Format<kDtype>::unpack(element, pair);
    sum = sum + pair[0];
  }
  __device__ __forceinline__ Word rounded() const {
    const float pair[2] = {sum, 0.0F};
    return static_cast<Word>(Format<kDtype>::pack(pair));
  }
};
template <>
struct ElementSum<Dtype::float32> {
  using Word = float;
  float sum = 0.0F;
  __device__ __forceinline__ void add(float element) { sum = sum + element; }
  __device__ __forceinline__ float rounded() const { return __uint_as_float(Format<Dtype::float32>::pack(&sum)); }
};
template <>
struct ElementSum<Dtype::float64> {
  using Word = double;
  double sum = 0.0;
  __device__ __forceinline__ void add(double element) { sum = sum + element; }
  // Every NaN is the one of the CPU.
  __device__ __forceinline__ double rounded() const { return sum == sum ? sum : __longlong_as_double(0x7fffffffffffffff); }
};

// 16 bytes of elements, on 16 bytes.
template <Dtype kDtype>
struct VectorSum {
  using Word = int4;
  Floats<kDtype> sum = Floats<kDtype>::zero();
  __device__ __forceinline__ void add(int4 vector) { sum.add(Floats<kDtype>::of(vector)); }
  __device__ __forceinline__ int4 rounded() const { return sum.packed(); }
};

}  // namespace tokenyard::cuda
