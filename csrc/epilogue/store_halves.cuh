// Finished sums that one warpgroup holds in registers, to Y: scaled and rounded there, laid out as
// halves in shared memory some rows at a time, and stored in whole lines.
#pragma once

#include "epilogue/rows.cuh"
#include "format/shared_memory.h"
#include "ptx/stmatrix.cuh"

namespace marlin {

// Rows of halves; the pad keeps the eight rows that stmatrix writes at once in different banks.
template <Sm90Shape kShape>
struct HalfRows {
  static constexpr int kRows = Sm90Shared<kShape>::kHalfRows;
  static constexpr int kColumns = Sm90Shared<kShape>::kTeamColumns;

  uint16_t halves[kRows][kColumns + 8];
};

// The scale (per column) and the bias of a lane's columns, two in each block.
template <bool kPerColumn, int kCount>
struct ColumnFactors {
  float scales[2 * kCount];
  float biases[2 * kCount];

  __device__ ColumnFactors(const GemmParams& params, int64_t column) {
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const int64_t mine = column + 8 * i;
      const bool inside = mine < params.n;
      scales[i] = kPerColumn && inside
                      ? load_element(params.scales, params.scale_dtype, scale_position(mine, true))
                      : 1.0f;
      biases[i] = params.bias != nullptr && inside
                      ? load_element(params.bias, params.bias_dtype, mine)
                      : 0.0f;
    }
  }

  __device__ float finish(float sum, int block, int half) const {
    const int i = 2 * block + half;
    return kPerColumn ? fmaf(sum, scales[i], biases[i]) : sum + biases[i];
  }
};

// `column`: of the lane's first block, in the team's columns. `barrier`: of the team.
template <typename Half, bool kPerColumn, Sm90Shape kShape, int kBatches, int kCount,
          typename Barrier>
__device__ void store_halves(const Sums<kBatches, kCount>& sums, HalfRows<kShape>& tile,
                             const GemmParams& params, const SliceOrigin& origin, int thread,
                             int column, const Barrier& barrier) {
  using Rows = HalfRows<kShape>;
  constexpr int kBatchesAtOnce = kBatches % 4 == 0 && Rows::kRows == 32 ? 4 : 2;
  constexpr int kRowChunks = Rows::kColumns / 8;
  static_assert(kBatches % kBatchesAtOnce == 0 && 8 * kBatchesAtOnce <= Rows::kRows);
  const int lane = thread % 32;
  const ColumnFactors<kPerColumn, kCount> factors(params, origin.column + column);
  const int block_column = column - lane / 4;  // of the warp
  // stmatrix' four: rows 0-7 with columns 0-7 and 8-15 of a block, then rows 8-15 with the same.
  const int store_row = lane % 8 + lane / 16 * 8, store_column = block_column + lane / 8 % 2 * 8;
#pragma unroll
  for (int first = 0; first < kBatches; first += kBatchesAtOnce) {
    if (origin.row + 8 * first >= params.m) break;
#pragma unroll
    for (int batch = 0; batch < kBatchesAtOnce; batch += 2)
#pragma unroll
      for (int block = 0; block < kCount; ++block) {
        uint32_t matrices[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* values = sums.values[block][first + batch + i / 2].values + i % 2 * 2;
          const uint32_t low = half_bits<Half>(factors.finish(values[0], block, i % 2));
          const uint32_t high = half_bits<Half>(factors.finish(values[1], block, i % 2));
          matrices[i] = low | high << 16;
        }
        ptx::stmatrix_transposed(&tile.halves[8 * batch + store_row][store_column + 16 * block],
                                 matrices);
      }
    barrier();
#pragma unroll
    for (int chunk = thread; chunk < 8 * kBatchesAtOnce * kRowChunks; chunk += 128) {
      const int row = chunk / kRowChunks, place = chunk % kRowChunks * 8;
      const int64_t y_row = origin.row + 8 * first + row, y_column = origin.column + place;
      if (y_row < params.m && y_column < params.n)
        *reinterpret_cast<Chunk*>(static_cast<uint16_t*>(params.y) + y_row * params.n + y_column) =
            *reinterpret_cast<const Chunk*>(&tile.halves[row][place]);
    }
    barrier();  // the rows may be overwritten
  }
}

}  // namespace marlin
