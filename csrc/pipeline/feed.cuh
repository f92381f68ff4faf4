// The producers of the sm_90 engine: what the four warps of the feeding warpgroup do. They walk over
// all tiles of the CTA's run, wait for a free stage, and fill their part of it:
//
//   warp 0      X, a box of a tensor map for each panel of 64 columns: swizzled, zero outside;
//               of twins each brings half of the rows, to both
//   warp 1      words, a box (the first round through the ring row by row)
//   warp 2      scales, a box
//   warp 3      makes scales ready that will multiply weights
//
// A predecessor in the stream may still be running when they start (programmatic dependent launch).
// X waits until it is done, and everything else in here waits for X, but for words and scales: kernels
// that compute leave them alone. One that writes them must not let its dependents start early (Marlin's
// own do not, and kernels that know nothing of this cannot): then all its CTAs are gone before this
// kernel starts, and their writes are in L2 when, a microsecond later, the first copy reads it. What ran
// before a predecessor of this engine is done: it lets the next start only after its own wait.
#pragma once

#include "core/gemm.h"
#include "pipeline/prepare_scales.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/tensor_maps.h"
#include "ptx/bulk_copy.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/warpgroup.cuh"

namespace marlin {

// A CTA's part of a slice that it may share with its twin.
template <Sm90Shape kShape>
__device__ Slice slice_of_cta(const LaunchParams& params, int64_t index) {
  constexpr int kStrips = Sm90Shared<kShape>::kStrips;
  Slice slice(params.raster, index, kShape.rows, kStrips * kShape.twins);
  slice.strip += twin_rank<kShape>() * kStrips;
  return slice;
}

template <Sm90Shape kShape>
using FeedPlace = RingPlace<kShape.stages, 1>;

// Waits until the stage at `place` is free: whoever used it has given it back.
template <Sm90Shape kShape>
__device__ void await_free(Sm90Shared<kShape>& shared, const FeedPlace<kShape>& place) {
  ptx::mbarrier_wait(&shared.empty[place.slot], place.parity ^ 1);
}

// Calls fill(slice, tile, slot) for every tile of the run, when its stage is free. Returns where the
// next one would go.
template <Sm90Shape kShape, typename Fill>
__device__ FeedPlace<kShape> for_each_stage(Sm90Shared<kShape>& shared, const LaunchParams& params,
                                            int run, Fill&& fill) {
  FeedPlace<kShape> place(0);
#pragma unroll 1
  for (SegmentWalk segment(params.partition, run); segment; segment.next()) {
    const Slice slice = slice_of_cta<kShape>(params, segment->slice);
#pragma unroll 1
    for (int tile = segment->first; tile < segment->last; ++tile, place.advance()) {
      await_free<kShape>(shared, place);
      fill(slice, tile, place.slot);
    }
  }
  return place;
}

// The rows of tiles of a stage, as far as they exist, one after the other.
template <Sm90Shape kShape>
__device__ void copy_word_rows(Sm90Shared<kShape>& shared, const GemmParams& gemm, int strip,
                               int tile, int slot) {
  constexpr int kTiles = Sm90Shared<kShape>::kTiles;
  constexpr int kStrips = Sm90Shared<kShape>::kStrips;
  const int64_t first_row = int64_t{tile} * kTiles;
  const int64_t rows_left = gemm.k / kTileRows - first_row;
  const int64_t strips_left = gemm.n / kTileColumns - strip;
  const int strips = static_cast<int>(strips_left < kStrips ? strips_left : kStrips);
  const int rows = strips <= 0 ? 0 : static_cast<int>(rows_left < kTiles ? rows_left : kTiles);
  const int bytes = strips * kTileWords * 4;
  const int64_t pitch = words_in_tile_row(gemm.n);
  const uint32_t* row = gemm.words + first_row * pitch + int64_t{strip} * kTileWords;
  ptx::mbarrier_arrive_expect(&shared.full[slot], rows * bytes);
  for (int i = 0; i < rows; ++i, row += pitch)
    ptx::bulk_copy(shared.words[slot][i], row, bytes, &shared.full[slot]);
}

// A box for each stage: one instruction, where row by row each row takes one, which keeps the issuing
// lane 50 to 65 cycles. But the first box waits for its tensor map, which takes longer than rows do, so
// the first round through the ring goes row by row: up to a microsecond of a small layer.
template <Sm90Shape kShape>
__device__ void feed_words(Sm90Shared<kShape>& shared, const LaunchParams& params,
                           const CUtensorMap& map, int run) {
  constexpr int kTiles = Sm90Shared<kShape>::kTiles;
  ptx::prefetch_tensor_map(&map);
  int by_rows = kShape.stages;
  for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    if (by_rows > 0) {
      --by_rows;
      copy_word_rows(shared, params.gemm, slice.strip, tile, slot);
    } else {
      ptx::mbarrier_arrive_expect(&shared.full[slot], sizeof(shared.words[slot]));
      ptx::tensor_copy_once(shared.words[slot], &map, slice.strip * kTileColumns, tile * kTiles,
                            &shared.full[slot]);
    }
  });
}

template <int kGroups, Sm90Shape kShape>
__device__ void feed_scales(Sm90Shared<kShape>& shared, const LaunchParams& params,
                            const CUtensorMap& map, int run) {
  using Groups = StageGroups<kShape, kGroups>;
  ptx::prefetch_tensor_map(&map);
  for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    ptx::Mbarrier* filled =
        kPrepareScales<kShape, kGroups> ? &shared.scales_full[slot] : &shared.full[slot];
    ptx::mbarrier_arrive_expect(filled, Groups::kCount * sizeof(shared.scales[slot][0]));
    ptx::tensor_copy(shared.scales[slot], &map, slice.strip * kTileColumns,
                     tile * kShape.depth / Groups::kGroupRows, filled);
  });
}

// Twins copy half the rows each, to both.
template <Sm90Shape kShape>
__device__ FeedPlace<kShape> feed_activations(Sm90Shared<kShape>& shared,
                                              const LaunchParams& params, const CUtensorMap& map,
                                              int run) {
  constexpr int kPanels = Sm90Shared<kShape>::kPanels;
  constexpr int kBytes = kPanels * kShape.rows * kSwizzleChunks * static_cast<int>(sizeof(Chunk));
  ptx::prefetch_tensor_map(&map);
  ptx::wait_for_predecessors();
  return for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    ptx::mbarrier_arrive_expect(&shared.full[slot], kBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = tile * kShape.depth + panel * kPanelColumns;
      const int row = slice.first_row;
      if constexpr (kShape.twins == 1) {
        ptx::tensor_copy(shared.activations[slot][panel], &map, column, row, &shared.full[slot]);
      } else {
        constexpr int kHalf = kShape.rows / kShape.twins;
        static_assert(kShape.twins == 2 && kHalf % 8 == 0, "whole periods of the swizzle");
        const int mine = twin_rank<kShape>() * kHalf;
        ptx::tensor_multicast(shared.activations[slot][panel][mine], &map, column, row + mine,
                              &shared.full[slot], 0b11);
      }
    }
  });
}

// A twin writes into the other's stages and barriers, so neither may go before all of that has arrived.
// It has when every stage is free once more: both have read it then, and both have said so here.
template <Sm90Shape kShape>
__device__ void await_twin(Sm90Shared<kShape>& shared, FeedPlace<kShape> place) {
  for (int i = 0; i < kShape.stages; ++i, place.advance()) await_free<kShape>(shared, place);
}

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void feed(Sm90Shared<kShape>& shared, const LaunchParams& params, const TensorMaps& maps,
                     int warp, int run) {
  if (warp == 3) {
    if constexpr (kPrepareScales<kShape, kGroups>)
      prepare_all_scales<Half, kGroups>(shared, params, run);
  } else if (ptx::elect_one()) {
    if (warp == 0) {
      const auto place = feed_activations(shared, params, maps.x, run);
      // The next kernel may start: it finds its place when this CTA goes.
      ptx::launch_dependents();
      if constexpr (kShape.twins > 1) await_twin(shared, place);
    } else if (warp == 1) {
      feed_words(shared, params, maps.words, run);
    } else if constexpr (kGroups > 0) {
      feed_scales<kGroups>(shared, params, maps.scales, run);
    }
  }
}

}  // namespace marlin
