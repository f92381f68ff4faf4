// The producers of the sm_90 engine: what the four warps of the feeding warpgroup do. They walk over
// all tiles of the CTA's run, wait for a free stage, and fill their part of it:
//
//   warp 0      X, a box of a tensor map for each panel of 64 columns: swizzled, zero outside; scales,
//               a piece for each group
//   warp 1      makes scales ready that will multiply weights
//   warps 2, 3  words, a piece for each row of tiles
//
// A predecessor in the stream may still be running when they start (programmatic dependent launch).
// It may be writing anything: X, but also the weights. So until it is done the weights come as far as
// L2 only, where its writes arrive, too.
#pragma once

#include "core/gemm.h"
#include "format/scale_order.h"
#include "pipeline/elements.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/scales.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/warpgroup.cuh"

namespace marlin {

inline constexpr int kWordWarps = 2;

// Whether a stage's scales are not ready as they come.
template <Sm90Shape kShape, int kGroups>
inline constexpr bool kPrepareScales = kGroups > 0 && !kShape.scales_sums();

// Arrivals that fill a stage.
template <Sm90Shape kShape, int kGroups>
inline constexpr int kProducers = 1 + kWordWarps + (kPrepareScales<kShape, kGroups> ? 1 : 0);

// The part of a stage of W that exists: whole tiles.
template <Sm90Shape kShape>
struct WordPieces {
  const uint32_t* first;
  int64_t pitch;  // words between rows of tiles
  int rows;
  int bytes;  // of each

  __device__ WordPieces(const GemmParams& gemm, int64_t strip, int tile) {
    constexpr int kTiles = Sm90Shared<kShape>::kTiles;
    const int64_t tile_row = int64_t{tile} * kTiles;
    const int64_t rows_left = gemm.k / kTileRows - tile_row;
    const int64_t strips_left = gemm.n / kTileColumns - strip;
    constexpr int kStrips = Sm90Shared<kShape>::kStrips;
    pitch = words_in_tile_row(gemm.n);
    first = gemm.words + tile_row * pitch + strip * kTileWords;
    rows = static_cast<int>(rows_left < kTiles ? rows_left : kTiles);
    bytes = static_cast<int>(strips_left < kStrips ? strips_left : kStrips) * kTileWords * 4;
  }
};

// By the consumers, who have nothing to do yet: each warp a share of the first stages' words.
template <Sm90Shape kShape>
__device__ void prefetch_words(const LaunchParams& params, int warp, int run) {
  constexpr int kWarps = 4 * kShape.consumers();
  if (!ptx::elect_one()) return;
  const SegmentWalk segment(params.partition, run);
  const Slice slice(segment->slice, params.row_tiles, kShape.rows, Sm90Shared<kShape>::kStrips);
#pragma unroll 1
  for (int i = 0; i < kShape.stages && segment->first + i < segment->last; ++i) {
    const WordPieces<kShape> pieces(params.gemm, slice.strip, segment->first + i);
#pragma unroll 1
    for (int row = warp; row < pieces.rows; row += kWarps)
      ptx::bulk_prefetch(pieces.first + row * pieces.pitch, pieces.bytes);
  }
}

// Calls fill(slice, tile, slot) for every tile of the run, when its stage is free and what came before
// this kernel is done.
template <Sm90Shape kShape, typename Fill>
__device__ void for_each_stage(Sm90Shared<kShape>& shared, const LaunchParams& params, int run,
                               Fill&& fill) {
  RingPlace<kShape.stages, 1> place(0);
  SegmentWalk segment(params.partition, run);
  ptx::wait_for_predecessors();
#pragma unroll 1
  for (; segment; segment.next()) {
    const Slice slice(segment->slice, params.row_tiles, kShape.rows, Sm90Shared<kShape>::kStrips);
#pragma unroll 1
    for (int tile = segment->first; tile < segment->last; ++tile, place.advance()) {
      ptx::mbarrier_wait(&shared.empty[place.slot], place.parity ^ 1);
      fill(slice, tile, place.slot);
    }
  }
}

// The groups of a stage: one also where a group is longer than a stage.
template <Sm90Shape kShape, int kGroups>
struct StageGroups {
  static constexpr int kGroupRows = kGroups > 0 ? 128 / kGroups : 0;
  static constexpr int kCount =
      kGroups == 0 ? 0 : (kShape.depth > kGroupRows ? kShape.depth / kGroupRows : 1);
};

template <int kGroups, Sm90Shape kShape>
__device__ void feed_activations_and_scales(Sm90Shared<kShape>& shared, const LaunchParams& params,
                                            const CUtensorMap& x_map, int run) {
  using Groups = StageGroups<kShape, kGroups>;
  constexpr int kPanels = Sm90Shared<kShape>::kPanels;
  constexpr int kBytes = kPanels * kShape.rows * kSwizzleChunks * static_cast<int>(sizeof(Chunk));
  for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    const GemmParams& gemm = params.gemm;
    int scale_bytes = 0;  // of a group
    int groups = 0;
    int64_t group = 0;
    if constexpr (kGroups > 0) {
      constexpr int kStrips = Sm90Shared<kShape>::kStrips;
      const int64_t strips_left = gemm.n / kTileColumns - slice.strip;
      scale_bytes = static_cast<int>(strips_left < kStrips ? strips_left : kStrips) * 128;
      group = int64_t{tile} * kShape.depth / Groups::kGroupRows;
      const int64_t groups_left = gemm.k / Groups::kGroupRows - group;
      groups = static_cast<int>(groups_left < Groups::kCount ? groups_left : Groups::kCount);
      // Past the end of W, where words are anything.
      for (int i = 0; i < Groups::kCount; ++i)
        for (int chunk = i < groups ? scale_bytes / 16 : 0; chunk < 8 * kStrips; ++chunk)
          (&shared.scales[slot][i][0][0])[chunk] = Chunk{};
    }
    ptx::Mbarrier* scales_full = &shared.full[slot];
    if constexpr (kPrepareScales<kShape, kGroups>) {
      scales_full = &shared.scales_full[slot];
      ptx::mbarrier_arrive_expect(scales_full, groups * scale_bytes);
      ptx::mbarrier_arrive_expect(&shared.full[slot], kBytes);
    } else {
      ptx::mbarrier_arrive_expect(&shared.full[slot], kBytes + groups * scale_bytes);
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::tensor_copy(shared.activations[slot][panel], &x_map,
                       tile * kShape.depth + panel * kPanelColumns,
                       static_cast<int>(slice.first_row), &shared.full[slot]);
    const auto* scales =
        static_cast<const uint16_t*>(gemm.scales) + group * gemm.n + slice.strip * kTileColumns;
#pragma unroll
    for (int i = 0; i < Groups::kCount; ++i)
      if (i < groups)
        ptx::bulk_copy(shared.scales[slot][i], scales + i * gemm.n, scale_bytes, scales_full);
  });
}

template <Sm90Shape kShape>
__device__ void feed_words(Sm90Shared<kShape>& shared, const LaunchParams& params, int run,
                           int part) {
  constexpr int kTiles = Sm90Shared<kShape>::kTiles;
  const int64_t pitch = words_in_tile_row(params.gemm.n);
  const uint32_t* first = nullptr;
  int bytes = 0;
  for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    auto copy_row = [&](int row) {
      ptx::bulk_copy(shared.words[slot][row], first + row * pitch, bytes, &shared.full[slot]);
    };
    const bool last = tile + 1 == params.partition.depth;
    if (bytes == 0 || tile == 0 || last) {  // else the stage lies below the one before
      const WordPieces<kShape> pieces(params.gemm, slice.strip, tile);
      first = pieces.first;
      bytes = pieces.bytes;
      if (last) {
        const int mine = (pieces.rows - part + kWordWarps - 1) / kWordWarps;
        ptx::mbarrier_arrive_expect(&shared.full[slot], mine * bytes);
        for (int row = part; row < pieces.rows; row += kWordWarps) copy_row(row);
        return;
      }
    }
    ptx::mbarrier_arrive_expect(&shared.full[slot], kTiles / kWordWarps * bytes);
#pragma unroll 4
    for (int row = part; row < kTiles; row += kWordWarps) copy_row(row);
    first += kTiles * pitch;
  });
}

// Puts scales that will multiply weights into the activations' type. A weight of up to eight scales must
// not overflow FP16: a stage with scales of 8192 or more gets an eighth of each, and eight passes.
// (Scales below 2^-11 beside one so large lose up to three bits to that.)
template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void prepare_scales(Sm90Shared<kShape>& shared, Dtype dtype, int slot) {
  constexpr int kChunks = StageGroups<kShape, kGroups>::kCount * kShape.columns / 8;
  const int lane = threadIdx.x % 32;
  Chunk* chunks = &shared.scales[slot][0][0][0];
  auto scale_of = [&](const Chunk& chunk, int i) {
    return scale_value(static_cast<uint16_t>(chunk.words[i / 2] >> (16 * (i % 2))), dtype);
  };
  bool large = false;
  for (int i = lane; i < kChunks; i += 32) {
    const Chunk chunk = chunks[i];
#pragma unroll
    for (int j = 0; j < 8; ++j) large |= !(fabsf(scale_of(chunk, j)) < 8192.0f);
  }
  const bool eighths = std::is_same_v<Half, __half> && __any_sync(~0u, large);
  if (lane == 0) shared.passes[slot] = eighths ? 8 : 1;
  const bool as_they_are = !eighths && dtype == dtype_of(Half{});
  if (as_they_are) return;
  const float factor = eighths ? 0.125f : 1.0f;
  for (int i = lane; i < kChunks; i += 32) {
    Chunk chunk = chunks[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = half_bits<Half>(scale_of(chunk, 2 * j) * factor);
      const uint32_t high = half_bits<Half>(scale_of(chunk, 2 * j + 1) * factor);
      chunk.words[j] = low | high << 16;
    }
    chunks[i] = chunk;
  }
}

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void prepare_all_scales(Sm90Shared<kShape>& shared, const LaunchParams& params,
                                   int run) {
  RingPlace<kShape.stages, 1> place(0);
  const int64_t tiles = params.partition.run_begin(run + 1) - params.partition.run_begin(run);
#pragma unroll 1
  for (int64_t i = 0; i < tiles; ++i, place.advance()) {
    ptx::mbarrier_wait(&shared.scales_full[place.slot], place.parity);
    prepare_scales<Half, kGroups>(shared, params.gemm.scale_dtype, place.slot);
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.full[place.slot]);
  }
}

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void feed(Sm90Shared<kShape>& shared, const LaunchParams& params,
                     const CUtensorMap& x_map, int warp, int run) {
  if (warp == 1) {
    if constexpr (kPrepareScales<kShape, kGroups>)
      prepare_all_scales<Half, kGroups>(shared, params, run);
  } else if (ptx::elect_one()) {
    if (warp == 0) feed_activations_and_scales<kGroups>(shared, params, x_map, run);
    else feed_words<kShape>(shared, params, run, warp - 2);
    // The next kernel may start: it finds its place when this CTA goes.
    ptx::launch_dependents();
  }
}

}  // namespace marlin
