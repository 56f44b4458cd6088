#pragma once
// Pieces of rows of any alignment and length, as float32 and back.

#include "experts/cuda/groups.cuh"
#include "kernels/cuda/numbers.cuh"

namespace tokenyard::experts_cuda {

using cuda::Floats;
using cuda::Format;
using cuda::kPerVector;

template <Dtype kDtype>
using Stored = std::conditional_t<kDtype == Dtype::float32, unsigned, std::uint16_t>;

template <Dtype kDtype>
__device__ __forceinline__ float load_element(const std::byte* row, std::int64_t at) {
  float pair[2];
  Format<kDtype>::unpack(reinterpret_cast<const Stored<kDtype>*>(row)[at], pair);
  return pair[0];
}

template <Dtype kDtype>
__device__ __forceinline__ void store_element(std::byte* row, std::int64_t at, float value) {
  const float pair[2] = {value, 0.0F};
  reinterpret_cast<Stored<kDtype>*>(row)[at] = static_cast<Stored<kDtype>>(Format<kDtype>::pack(pair));
}

// Elements [first, first + a vector) of a row of `columns`; zeros behind its end.
template <Dtype kDtype>
__device__ __forceinline__ Floats<kDtype> load_piece(const std::byte* row, std::int64_t first, std::int64_t columns) {
  const std::byte* from = row + first * Format<kDtype>::kSize;
  if (first + kPerVector<kDtype> <= columns && cuda::is_aligned(from, cuda::kVectorBytes)) {
    return Floats<kDtype>::of(*reinterpret_cast<const int4*>(from));
  }
  Floats<kDtype> piece = Floats<kDtype>::zero();
#pragma unroll
  for (int i = 0; i < kPerVector<kDtype>; ++i) {
    if (first + i < columns) piece.at[i] = load_element<kDtype>(row, first + i);
  }
  return piece;
}

template <Dtype kDtype>
__device__ __forceinline__ void store_piece(std::byte* row, std::int64_t first, std::int64_t columns, const Floats<kDtype>& piece) {
  std::byte* to = row + first * Format<kDtype>::kSize;
  if (first + kPerVector<kDtype> <= columns && cuda::is_aligned(to, cuda::kVectorBytes)) {
    *reinterpret_cast<int4*>(to) = piece.packed();
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerVector<kDtype>; ++i) {
    if (first + i < columns) store_element<kDtype>(row, first + i, piece.at[i]);
  }
}

// The same as it lies. kWhole: rows are whole vectors, and aligned, so that no load waits for a decision.
template <Dtype kDtype, bool kWhole>
__device__ __forceinline__ int4 load_packed(const std::byte* row, std::int64_t first, std::int64_t columns) {
  if constexpr (kWhole) return *reinterpret_cast<const int4*>(row + first * Format<kDtype>::kSize);
  return load_piece<kDtype>(row, first, columns).packed();
}
template <Dtype kDtype, bool kWhole>
__device__ __forceinline__ void store_packed(std::byte* row, std::int64_t first, std::int64_t columns, const Floats<kDtype>& piece) {
  if constexpr (kWhole) {
    *reinterpret_cast<int4*>(row + first * Format<kDtype>::kSize) = piece.packed();
  } else {
    store_piece<kDtype>(row, first, columns, piece);
  }
}

// On the host: whether dense rows of `columns` are whole pieces of `bytes`, from wherever these pointers say (null: not there).
template <class... Pointers>
bool are_whole(int bytes, Dtype dtype, std::int64_t columns, Pointers... rows) {
  return columns * size_of(dtype) % bytes == 0 && ((reinterpret_cast<std::uintptr_t>(rows) % bytes == 0) && ...);
}

// Calls the launcher for one of the three types of rows.
template <class Fn>
void visit_rows(Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::float32) fn(std::integral_constant<Dtype, Dtype::float32>());
  if (dtype == Dtype::bfloat16) fn(std::integral_constant<Dtype, Dtype::bfloat16>());
  if (dtype == Dtype::float16) fn(std::integral_constant<Dtype, Dtype::float16>());
}
// ... and with whether all rows are whole vectors.
template <class Fn>
void visit_rows(Dtype dtype, bool whole, Fn&& fn) {
  visit_rows(dtype, [&](auto of) {
    if (whole) {
      fn(of, std::true_type());
    } else {
      fn(of, std::false_type());
    }
  });
}

}  // namespace tokenyard::experts_cuda
