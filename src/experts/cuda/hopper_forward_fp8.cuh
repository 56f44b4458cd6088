#pragma once
// float8 rows with a scale for 128 elements, weights with one for 128 x 128: the sums of 128 products are scaled and added in
// float32. Scales lie as dispatch and checkpoints have them, along k.

#include "experts/cuda/hopper.cuh"
#include "experts/cuda/scaled.h"

namespace tokenyard::experts_cuda::hopper {

struct CooperativeScaled {
  using Kernel = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8Blockwise;
  using Epilogue = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};
using ScaledBlocks = Blocking<Shape<_128, _128, _128>, Shape<_1, _1, _1>, CooperativeScaled>;
// Pairs share the tiles of rows.
using ScaledPairsBlocks = Blocking<Shape<_128, _128, _128>, Shape<_1, _2, _1>, CooperativeScaled>;

template <class Out, class Blocks>
struct Scaled {
  static constexpr bool kAccumulates = false;
  using Tile = typename Blocks::Tile;
  using Cluster = typename Blocks::Cluster;
  using Element = cutlass::float_e4m3_t;
  using Scales = cutlass::detail::Sm90BlockwiseScaleConfig<1, kQuantiseBlock, kQuantiseBlock, GMMA::Major::K, GMMA::Major::K>;
  using ScalesA = decltype(Scales::deduce_layoutSFA());
  using ScalesB = decltype(Scales::deduce_layoutSFB());
  using Epilogue =
      typename cutlass::epilogue::collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
                                                                cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
                                                                RowMajor*, 16 / sizeof(Out), Out, RowMajor*, 16 / sizeof(Out),
                                                                typename Blocks::Schedule::Epilogue, AddBias<Tile, Out>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, tuple<RowMajor*, ScalesA*>, 16, Element, tuple<ColumnMajor*, ScalesB*>,
      16, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Blocks::Schedule::Kernel>::CollectiveOp;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue>>;
};

template <class K>
typename K::Gemm::Arguments scaled_arguments(const ScaledArgs& args) {
  auto result = arguments_of<K>(args.hopper);
  result.mainloop.ptr_SFA = args.a_scales;
  result.mainloop.ptr_SFB = args.b_scales;
  return result;
}

template <class K>
std::size_t scaled_workspace_bytes(const ScaledArgs& args) {
  return K::Gemm::get_workspace_size(scaled_arguments<K>(args));
}

// False when CUTLASS refuses; the runtime's last error may say why.
template <class K>
bool run_scaled(const ScaledArgs& args) {
  typename K::Gemm gemm;
  return gemm.run(scaled_arguments<K>(args), args.hopper.workspace, args.hopper.stream) == cutlass::Status::kSuccess;
}

}  // namespace tokenyard::experts_cuda::hopper
