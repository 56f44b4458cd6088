#pragma once
// The Hopper kernels: CUTLASS's persistent, warp-specialised grouped product. Each group has tensor maps of its own, made on the
// device, whose bounds are the group's: what lies behind its last row is neither loaded (zeros are) nor written.

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "core/preload.h"
#include "experts/cuda/grouped.h"

namespace tokenyard::experts_cuda::hopper {

using namespace cute;

using ProblemShape = cutlass::gemm::GroupProblemShape<Shape<int, int, int>>;
using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;

struct Cooperative {
  using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

struct PingPong {
  using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong;
};

// y = accumulator + bias[group][n]; zeros for no bias.
template <class Tile, class Element>
using AddBias = cutlass::epilogue::fusion::Sm90EVT<
    cutlass::epilogue::fusion::Sm90Compute<cutlass::plus, Element, float, cutlass::FloatRoundStyle::round_to_nearest>,
    cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Element, float, Stride<_0, _1, int64_t>>, cutlass::epilogue::fusion::Sm90AccFetch>;
// y = accumulator + what y holds.
using AddTo = cutlass::epilogue::fusion::LinearCombination<float, float>;

template <class ElementA, class LayoutOfA, class LayoutOfB>
struct Operands {
  using Element = ElementA;
  using LayoutA = LayoutOfA;
  using LayoutB = LayoutOfB;
};
template <class TileMnk, class ClusterMnk, class ScheduleKind>
struct Blocking {
  using Tile = TileMnk;
  using Cluster = ClusterMnk;
  using Schedule = ScheduleKind;
};

// Chosen by measurement, see docs/experts.md. No clusters: the last rows of a group would leave half of a pair without work.
using WideBlocks = Blocking<Shape<_128, _256, _64>, Shape<_1, _1, _1>, Cooperative>;
// For numbers of columns that wide tiles would fill badly.
using NarrowBlocks = Blocking<Shape<_128, _192, _64>, Shape<_1, _1, _1>, Cooperative>;
// Reading the weights is all that takes time: many loads under way.
using FewRowsBlocks = Blocking<Shape<_64, _128, _128>, Shape<_1, _1, _1>, PingPong>;

template <class In, class Out, class Blocks>
struct Kernel {
  static constexpr bool kAccumulates = is_same_v<Out, float>;
  static constexpr int kAlignment = 16 / sizeof(typename In::Element);
  static constexpr int kOutAlignment = 16 / sizeof(Out);
  using Tile = typename Blocks::Tile;
  using Fusion = conditional_t<kAccumulates, AddTo, AddBias<Tile, Out>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, typename Blocks::Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
      float, float, conditional_t<kAccumulates, float, void>, RowMajor*, kOutAlignment, Out, RowMajor*, kOutAlignment,
      typename Blocks::Schedule::Epilogue, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, typename In::Element, typename In::LayoutA*, kAlignment, typename In::Element,
      typename In::LayoutB*, kAlignment, float, Tile, typename Blocks::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Blocks::Schedule::Kernel>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>>;
};

// The table's strides are what these kernels take: their other members are constants.
template <class Stride>
Stride* strides(std::int64_t* table) {
  static_assert(sizeof(Stride) == sizeof(std::int64_t));
  return reinterpret_cast<Stride*>(table);
}

template <class K>
typename K::Gemm::Arguments arguments_of(const HopperArgs& args) {
  using Gemm = typename K::Gemm;
  using Kernel = typename Gemm::GemmKernel;
  using Element = typename Kernel::ElementA;
  using Out = typename Kernel::ElementD;
  const GroupTable& table = args.table;
  typename Gemm::Arguments result{};
  result.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  result.problem_shape = {args.grouped.groups.num_groups, reinterpret_cast<typename ProblemShape::UnderlyingProblemShape*>(table.shapes),
                          nullptr};
  result.mainloop.ptr_A = reinterpret_cast<const Element**>(table.a);
  result.mainloop.dA = strides<typename Kernel::InternalStrideA>(table.a_stride);
  result.mainloop.ptr_B = reinterpret_cast<const Element**>(table.b);
  result.mainloop.dB = strides<typename Kernel::InternalStrideB>(table.b_stride);
  result.epilogue.ptr_D = reinterpret_cast<Out**>(table.d);
  result.epilogue.dD = strides<typename Kernel::InternalStrideD>(table.d_stride);
  if constexpr (K::kAccumulates) {
    result.epilogue.ptr_C = const_cast<const Out**>(reinterpret_cast<Out**>(table.d));
    result.epilogue.dC = strides<typename Kernel::InternalStrideC>(table.d_stride);
    result.epilogue.thread.alpha = 1.0F;
    result.epilogue.thread.beta = 1.0F;
  } else {
    result.epilogue.thread = {{reinterpret_cast<const Out*>(args.grouped.bias), Out(0), {_0{}, _1{}, args.grouped.n}}, {}, {}};
  }
  result.hw_info.sm_count = args.num_sms;
  // Tiles that run side by side share whichever of a group is more, its weights or its rows: that is read once, the other from the cache.
  using Order = decltype(result.scheduler.raster_order);
  const bool is_wide = args.grouped.n >= likely_rows(args.grouped.groups);
  result.scheduler.raster_order = K::kAccumulates || is_wide ? Order::AlongM : Order::AlongN;
  return result;
}

template <class K>
std::size_t workspace_bytes(const HopperArgs& args) {
  return K::Gemm::get_workspace_size(arguments_of<K>(args));
}

// False when CUTLASS refuses; the runtime's last error may say why.
template <class K>
bool run(const HopperArgs& args) {
  typename K::Gemm gemm;
  return gemm.run(arguments_of<K>(args), args.workspace, args.stream) == cutlass::Status::kSuccess;
}

}  // namespace tokenyard::experts_cuda::hopper
