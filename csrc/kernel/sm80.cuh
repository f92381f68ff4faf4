// The engine for every GPU from 8.0 on: cp.async rings feeding mma.sync.
//
//   global --WeightCopy, ActivationCopy, ScaleCopy--> Stage (shared) --fragments--> Sums (registers)
//   Sums --finish_slice--> rows in shared memory --Handover--> the slice's owner --> Y
//   Sums of tall warps --finish_tall_slice, Handover--> the slice's owner --> rows --> Y
//
// Each depth group of warps owns a ring of stages and takes every depth_groups-th tile of the CTA's
// run. Copies run `stages - 1` tiles ahead, on into the next segment of the run.
#pragma once

#include "core/config.h"
#include "core/partition.h"
#include "epilogue/finish.cuh"
#include "epilogue/finish_tall.cuh"
#include "pipeline/activations.cuh"
#include "pipeline/scales.cuh"
#include "pipeline/stage.cuh"
#include "pipeline/sums.cuh"
#include "pipeline/weight_scales.cuh"
#include "pipeline/weights.cuh"

namespace marlin {

// Copies of a run's stages, one after the other; one commit group per stage, also past the end.
template <CtaShape kShape, int kGroups>
class StageCopy {
 public:
  __device__ StageCopy(const LaunchParams& params, const Role<kShape>& role, int run)
      : params_(params),
        role_(role),
        walk_(params.partition, run, role.depth_group, kShape.depth_groups) {
    if (walk_) seek();
  }

  __device__ void load_next(Stage<kShape>& stage) {
    if (walk_) {
      weights_.load(stage, params_.gemm, role_);
      activations_.load(stage, params_.gemm, role_);
      if constexpr (kGroups > 0) scales_.load(stage, params_.gemm, role_);
      if (walk_.next()) advance();
      else if (walk_) seek();
    }
    ptx::cp_async_commit();
  }

 private:
  __device__ void seek() {
    const Slice slice(params_.raster, walk_.slice(), kShape.rows, kShape.column_warps);
    weights_.seek(params_.gemm, role_, slice.strip, walk_.tile());
    activations_.seek(params_.gemm, role_, slice.first_row, walk_.tile());
    if constexpr (kGroups > 0) scales_.seek(params_.gemm, role_, slice.strip, walk_.tile());
  }

  __device__ void advance() {
    weights_.advance(params_.gemm);
    activations_.advance();
    if constexpr (kGroups > 0) scales_.advance();
  }

  const LaunchParams& params_;
  const Role<kShape>& role_;
  TileWalk walk_;
  WeightCopy<kShape> weights_;
  ActivationCopy<kShape> activations_;
  ScaleCopy<kShape, kGroups> scales_;
};

// sums += W · X of tiles [first, last) of a stage. Unrolled, so that the compiler fetches words and X of
// the next tiles into other registers while one is multiplied, as its machine code for 8.0 does.
template <typename Half, CtaShape kShape, int kBatches, typename Dequantized>
__device__ void multiply_tiles(const Stage<kShape>& stage, const Role<kShape>& role, int first,
                               int last, const Dequantized& dequantized, Sums<kBatches>& sums) {
#pragma unroll
  for (int tile = first; tile < last; ++tile)
    sums.template multiply<Half>(words_of(stage, role, tile), dequantized, [&](int batch) {
      ActivationFragments x;
      x.load<kBatches == 1>(stage.activations, role.lane, role.row_warp * kShape.rows_per_warp(),
                            tile, batch);
      return x;
    });
}

// A warp's sums over a segment, with kGroups groups of scales per stage. Without any (per column), sums
// stay in units of the scale until the end.
//
// A group's product is kept apart, scaled in FP32 and added, so no scale is too large, too small or
// zero. It takes as many registers as the sums: warps of more than 32 rows do not have them, and scale
// weights.
template <typename Half, int kGroups, CtaShape kShape>
class Multiplier {
  static constexpr int kTiles = Stage<kShape>::kTiles;
  static constexpr int kGroupTiles = kTiles / (kGroups > 0 ? kGroups : 1);
  static constexpr bool kScalesWeights = kGroups > 0 && !kShape.scales_sums();

 public:
  Sums<kShape.rows_per_warp() / 8> sums;

  __device__ void multiply_stage(const Stage<kShape>& stage, const Role<kShape>& role,
                                 Dtype scale_dtype) {
    const auto unscaled = [](uint32_t word, int) { return dequantize<Half>(word); };
    const auto scaled = [&](uint32_t word, int block) { return scales_.dequantized(word, block); };
    if constexpr (kGroups == 0) multiply_tiles<Half>(stage, role, 0, kTiles, unscaled, sums);
// Unrolled, two products at once would spill.
#pragma unroll(kGroups > 1 && kShape.scales_sums() ? 1 : 8)
    for (int group = 0; group < kGroups; ++group) {
      const int first = group * kGroupTiles, last = first + kGroupTiles;
      const Chunk& scales = stage.scales[group][role.column_warp][role.fragment_column];
      if constexpr (kScalesWeights) {
        scales_.take(scales, scale_dtype, sums);
        multiply_tiles<Half>(stage, role, first, last, scaled, sums);
      } else {
        decltype(sums) product;
        multiply_tiles<Half>(stage, role, first, last, unscaled, product);
        sums.add_scaled(product, ScaleFragment(scales, scale_dtype));
      }
    }
  }

  __device__ void finish() {
    if constexpr (kScalesWeights) scales_.settle(sums);
  }

 private:
  WeightScales<Half> scales_;
};

// Templated on the index of its shape: nvcc 13.0 cannot name a kernel by a class-type argument.
template <size_t kIndex, typename Half, int kGroups>
__global__ void __launch_bounds__(kSm80Shapes[kIndex].shape.threads(), 1)
    sm80_kernel(const __grid_constant__ LaunchParams params) {
  constexpr CtaShape kShape = kSm80Shapes[kIndex].shape;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<SharedMemory<kShape>*>(memory);
  const Role<kShape> role;
  const int run = run_of_block(params.partition);
  auto& ring = shared.stages[role.depth_group];

  // The first copies leave before anything else is worked out.
  StageCopy<kShape, kGroups> copy(params, role, run);
  for (int i = 0; i + 1 < kShape.stages; ++i) copy.load_next(ring[i]);
  int slot = 0, free_slot = kShape.stages - 1;

  for (SegmentWalk segment(params.partition, run); segment; segment.next()) {
    Multiplier<Half, kGroups, kShape> multiplier;
    // All depth groups take as many turns, the last ones perhaps idle: racecheck counts barriers.
    for (int tile = segment->first; tile < segment->last; tile += kShape.depth_groups) {
      ptx::cp_async_wait<kShape.stages - 2>();
      role.group_barrier();
      if (tile + role.depth_group >= segment->last) continue;
      copy.load_next(ring[free_slot]);
      multiplier.multiply_stage(ring[slot], role, params.gemm.scale_dtype);
      free_slot = slot;
      slot = slot + 1 == kShape.stages ? 0 : slot + 1;
    }
    multiplier.finish();

    const Slice slice(params.raster, segment->slice, kShape.rows, kShape.column_warps);
    const Sharing sharing = params.partition.sharing(run, segment->slice);
    const SliceHandover<kShape> handover(params.workspace, sharing, run);
    const SliceOrigin origin{slice.first_row, slice.strip * kTileColumns};
    if constexpr (kShape.adds_in_registers())
      finish_tall_slice<Half, kGroups == 0>(multiplier.sums, role, shared, free_slot, params.gemm,
                                            origin, handover);
    else
      finish_slice<Half, kGroups == 0>(multiplier.sums, role, shared, free_slot, params.gemm,
                                       origin, handover);
  }
}

}  // namespace marlin
