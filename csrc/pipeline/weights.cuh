// W: packed words, global -> shared -> registers. Both hops move them as they lie in memory.
#pragma once

#include "pipeline/stage.cuh"
#include "ptx/cp_async.cuh"

namespace marlin {

// Each warp fetches tiles of its own columns, one 16-byte chunk per lane: whole 512-byte lines.
// Offsets count chunks.
template <CtaShape kShape>
class WeightCopy {
  static constexpr int kTiles = Stage<kShape>::kTiles;

 public:
  // `strip`: the CTA's first 64-column strip; `tile`: the stage along k.
  __device__ void seek(const GemmParams& params, const Role<kShape>& role, int64_t strip,
                       int tile) {
    const int64_t column_strip = strip + role.column_warp;
    const int64_t tile_row = int64_t{tile} * kTiles + role.row_warp;
    offset_ = static_cast<uint32_t>(tile_row * pitch(params) + column_strip * (kTileWords / 4) +
                                    role.lane);
    const bool inside = column_strip < params.n / kTileColumns;
    tile_rows_left_ = inside ? static_cast<int>(params.k / kTileRows - tile_row) : 0;
  }

  __device__ void load(Stage<kShape>& stage, const GemmParams& params,
                       const Role<kShape>& role) const {
    const auto* words = reinterpret_cast<const Chunk*>(params.words);
#pragma unroll
    for (int i = 0; i < kTiles; i += kShape.row_warps)
      ptx::cp_async(&stage.words[i + role.row_warp][role.column_warp][role.lane],
                    words + (offset_ + i * pitch(params)), i < tile_rows_left_);
  }

  // To this depth group's next stage of the slice.
  __device__ void advance(const GemmParams& params) {
    constexpr int kAhead = kTiles * kShape.depth_groups;
    offset_ += kAhead * pitch(params);
    tile_rows_left_ -= kAhead;
  }

 private:
  static __device__ uint32_t pitch(const GemmParams& params) {  // chunks between tile rows
    return static_cast<uint32_t>(params.n / 2);
  }
  static_assert(kTileWords / 4 * 2 == kTileColumns, "n / 2 chunks in a row of tiles");

  uint32_t offset_;
  int tile_rows_left_;
};

// The words of this lane's four blocks of a tile.
template <CtaShape kShape>
__device__ inline const Chunk& words_of(const Stage<kShape>& stage, const Role<kShape>& role,
                                        int tile) {
  return stage.words[tile][role.column_warp][role.lane];
}

}  // namespace marlin
