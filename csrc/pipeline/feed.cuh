// The producers of the sm_90 engine: what the four warps of the feeding warpgroup do. Each walks over
// all tiles of the CTA's run, waits for a free stage, and fills its part of it:
//
//   warp 0      X, a box of a tensor map for each panel of 64 columns: swizzled, zero outside
//   warp 1      scales, 16 bytes a lane
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
#include "ptx/cp_async.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/warpgroup.cuh"

namespace marlin {

inline constexpr int kWordWarps = 2;
inline constexpr int kProducers = 2 + kWordWarps;  // arrivals that fill a stage

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
__device__ void prefetch_words(const LaunchParams& params, int run) {
  constexpr int kWarps = 4 * kShape.consumers();
  const int warp = threadIdx.x / 32;
  if (!ptx::elect_one()) return;
  const SegmentWalk segment(params.partition, run);
  const Slice slice(segment->slice, params.row_tiles, kShape.rows,
                    Sm90Shared<kShape>::kStrips);
#pragma unroll 1
  for (int i = 0; i < kShape.stages && segment->first + i < segment->last; ++i) {
    const WordPieces<kShape> pieces(params.gemm, slice.strip, segment->first + i);
#pragma unroll 1
    for (int row = warp; row < pieces.rows; row += kWarps)
      ptx::bulk_prefetch(pieces.first + row * pieces.pitch, pieces.bytes);
  }
}

// Calls fill(slice, tile, slot) for every tile of the run, when its stage is free.
template <Sm90Shape kShape, typename Fill>
__device__ void for_each_stage(Sm90Shared<kShape>& shared, const LaunchParams& params, int run,
                               Fill&& fill) {
  RingPlace<kShape.stages, 1> place(0);
#pragma unroll 1
  for (SegmentWalk segment(params.partition, run); segment; segment.next()) {
    const Slice slice(segment->slice, params.row_tiles, kShape.rows,
                      Sm90Shared<kShape>::kStrips);
#pragma unroll 1
    for (int tile = segment->first; tile < segment->last; ++tile, place.advance()) {
      if constexpr (requires { fill.before_wait(0, 0u); })
        fill.before_wait(place.slot, place.parity ^ 1);
      ptx::mbarrier_wait(&shared.empty[place.slot], place.parity ^ 1);
      fill(slice, tile, place.slot);
    }
  }
}

template <Sm90Shape kShape>
__device__ void feed_activations(Sm90Shared<kShape>& shared, const LaunchParams& params,
                                 const CUtensorMap& x_map, int run) {
  constexpr int kPanels = Sm90Shared<kShape>::kPanels;
  constexpr int kBytes = kPanels * kShape.rows * kSwizzleChunks * static_cast<int>(sizeof(Chunk));
  for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    ptx::mbarrier_arrive_expect(&shared.full[slot], kBytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::tensor_copy(shared.activations[slot][panel], &x_map,
                       tile * kShape.depth + panel * kPanelColumns,
                       static_cast<int>(slice.first_row), &shared.full[slot]);
  });
}

template <Sm90Shape kShape>
__device__ void feed_words(Sm90Shared<kShape>& shared, const LaunchParams& params, int run,
                           int part) {
  for_each_stage<kShape>(shared, params, run, [&](const Slice& slice, int tile, int slot) {
    const WordPieces<kShape> pieces(params.gemm, slice.strip, tile);
    const int mine = (pieces.rows - part + kWordWarps - 1) / kWordWarps;
    ptx::mbarrier_arrive_expect(&shared.full[slot], mine * pieces.bytes);
    const uint32_t* piece = pieces.first + part * pieces.pitch;
#pragma unroll 4
    for (int row = part; row < pieces.rows; row += kWordWarps, piece += kWordWarps * pieces.pitch)
      ptx::bulk_copy(shared.words[slot][row], piece, pieces.bytes, &shared.full[slot]);
  });
}

// Scales come as they are. Where they will multiply weights, they are then put into the activations'
// type, and a weight of up to eight scales must not overflow FP16: a stage with scales of 8192 or more
// gets an eighth of each, and eight passes. So this warp sees every stage twice: it asks for scales as
// far ahead as there are free stages, and hands a stage on when they are there.
template <Sm90Shape kShape, typename Half, int kGroups>
class ScaleFeed {
  static constexpr int kGroupRows = 128 / kGroups;
  // Of a stage; one also where a group is longer than a stage.
  static constexpr int kStageGroups = kShape.depth > kGroupRows ? kShape.depth / kGroupRows : 1;
  static constexpr int kRowChunks = kShape.columns / 8;
  static constexpr int kChunks = kStageGroups * kRowChunks;
  static constexpr int kPerLane = (kChunks + 31) / 32;
  static constexpr int kGroupStep = 32 / kRowChunks;  // from a lane's chunk to its next one
  static_assert(32 % kRowChunks == 0);

 public:
  __device__ ScaleFeed(Sm90Shared<kShape>& shared, const GemmParams& gemm)
      : shared_(shared), gemm_(gemm), lane_(threadIdx.x % 32) {}

  __device__ void operator()(const Slice& slice, int tile, int slot) {
    const uint32_t pitch = static_cast<uint32_t>(gemm_.n / 8);
    const uint32_t column = static_cast<uint32_t>(slice.strip) * 8 + lane_ % kRowChunks;
    const uint32_t groups = column < pitch ? static_cast<uint32_t>(gemm_.k) / kGroupRows : 0;
    const uint32_t first =
        static_cast<uint32_t>(tile) * kShape.depth / kGroupRows + lane_ / kRowChunks;
    const auto* scales = static_cast<const Chunk*>(gemm_.scales) + column;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const uint32_t group = first + i * kGroupStep;
      if (lane_ + 32 * i < kChunks)
        ptx::cp_async(place(slot, i), scales + uint64_t{group} * pitch, group < groups);
    }
    ptx::cp_async_commit();
    ++asked_;
  }

  // Instead of waiting for a free stage.
  __device__ void before_wait(int slot, uint32_t parity) {
    while (asked_ > 0 && !ptx::mbarrier_test(&shared_.empty[slot], parity)) hand_on();
  }

  __device__ void hand_on_the_rest() {
    while (asked_ > 0) hand_on();
  }

 private:
  __device__ Chunk* place(int slot, int i) {
    return &shared_.scales[slot][0][0][0] + (lane_ + 32 * i);
  }

  // Waits for the oldest of kAsked stages, or of fewer.
  template <int kAsked>
  __device__ void await_oldest() {
    if constexpr (kAsked > 1) {
      if (asked_ < kAsked) return await_oldest<kAsked - 1>();
    }
    ptx::cp_async_wait<kAsked - 1>();
  }

  __device__ void hand_on() {
    await_oldest<kShape.stages>();
    if constexpr (!kShape.scales_sums()) prepare(oldest_.slot);
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(&shared_.full[oldest_.slot]);
    oldest_.advance();
    --asked_;
  }

  __device__ void prepare(int slot) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane_ + 32 * i >= kChunks) continue;
      const Chunk chunk = *place(slot, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) large |= !(fabsf(scale_of(chunk, j)) < 8192.0f);
    }
    const bool eighths = std::is_same_v<Half, __half> && __any_sync(~0u, large);
    if (lane_ == 0) shared_.passes[slot] = eighths ? 8 : 1;
    const float factor = eighths ? 0.125f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane_ + 32 * i >= kChunks) continue;
      Chunk chunk = *place(slot, i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = half_bits<Half>(scale_of(chunk, 2 * j) * factor);
        const uint32_t high = half_bits<Half>(scale_of(chunk, 2 * j + 1) * factor);
        chunk.words[j] = low | high << 16;
      }
      *place(slot, i) = chunk;
    }
  }

  __device__ float scale_of(const Chunk& chunk, int i) const {
    return scale_value(static_cast<uint16_t>(chunk.words[i / 2] >> (16 * (i % 2))),
                       gemm_.scale_dtype);
  }

  Sm90Shared<kShape>& shared_;
  const GemmParams& gemm_;
  int lane_;
  int asked_ = 0;  // stages that are under way
  RingPlace<kShape.stages, 1> oldest_{0};
};

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void feed(Sm90Shared<kShape>& shared, const LaunchParams& params,
                     const CUtensorMap& x_map, int run) {
  const int warp = threadIdx.x / 32 % 4;
  ptx::wait_for_predecessors();
  if (warp == 1) {
    if constexpr (kGroups > 0) {
      ScaleFeed<kShape, Half, kGroups> scales(shared, params.gemm);
      for_each_stage<kShape>(shared, params, run, scales);
      scales.hand_on_the_rest();
    } else if (ptx::elect_one()) {
      for_each_stage<kShape>(shared, params, run, [&](const Slice&, int, int slot) {
        ptx::mbarrier_arrive(&shared.full[slot]);
      });
    }
  } else if (ptx::elect_one()) {
    if (warp == 0) feed_activations<kShape>(shared, params, x_map, run);
    else feed_words<kShape>(shared, params, run, warp - 2);
  }
  // The next kernel may start: it finds its place when this CTA goes.
  ptx::launch_dependents();
}

}  // namespace marlin
