#pragma once
// A move as its kernels get it: the arguments, and how wide the accesses to the caller's memory may be.

#include "kernels/cuda/kernels.h"

namespace tokenyard::cuda {

// The largest power of two, up to 16, that divides every one of the addresses, strides and sizes or-ed together in `bits`.
constexpr int access_width(std::uint64_t bits) {
  int width = 16;
  while (bits % static_cast<unsigned>(width) != 0) width /= 2;
  return width;
}
inline std::uint64_t address_bits(const void* data) { return reinterpret_cast<std::uintptr_t>(data); }

// The scales of a row as units of one access each. A column is what lies together at the source: one element, or everything.
struct ScaleCopy {
  int width = 1;  // bytes of a unit
  int units = 0;  // per row
  int units_per_column = 1;
  std::int64_t row_bytes = 0;  // of a row's scales at the destination
};

inline ScaleCopy scale_copy(const SourceArgs& source) {
  if (source.quantise || source.scale_bytes() == 0) return {.row_bytes = source.scale_bytes()};
  const bool dense = source.scales.column_stride == source.scale_element || source.scale_columns == 1;
  const std::int64_t column_bytes = dense ? source.scale_bytes() : source.scale_element;
  std::uint64_t bits = address_bits(source.scales.data) | static_cast<std::uint64_t>(source.scales.row_stride | column_bytes);
  if (!dense) bits |= static_cast<std::uint64_t>(source.scales.column_stride);
  ScaleCopy copy{.width = access_width(bits), .row_bytes = source.scale_bytes()};
  copy.units = static_cast<int>(source.scale_bytes() / copy.width);
  copy.units_per_column = static_cast<int>(column_bytes / copy.width);
  return copy;
}

struct MoveJob {
  MoveArgs args;
  ScaleCopy scales;
  int row_width = 16;  // of accesses to the rows
};

inline MoveJob move_job(const MoveArgs& args) {
  return {.args = args,
          .scales = scale_copy(args.source),
          .row_width = access_width(address_bits(args.source.rows) | static_cast<std::uint64_t>(args.source.row_stride))};
}

void launch_move_vector(const MoveJob& job, Stream stream);
// Needs compute capability 9.0, rows that fit into the shared memory of a block, and aligned ones unless it quantises them.
bool can_move_bulk(const MoveJob& job);
void launch_move_bulk(const MoveJob& job, Stream stream);

}  // namespace tokenyard::cuda
