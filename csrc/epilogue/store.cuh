// Finished sums to Y: the per-column scale, the bias, one rounding, and whole 16-byte chunks.
#pragma once

#include "pipeline/sums.cuh"
#include "pipeline/elements.cuh"

namespace marlin {

// For the threads of the first depth group.
template <typename Half, bool kPerColumn, CtaShape kShape>
__device__ void store_rows(const Sums<kShape>& sums, const Role<kShape>& role,
                           const GemmParams& params, int64_t strip, int64_t first_row,
                           OutputScratch<kShape>& scratch) {
  const int64_t warp_column = (strip + role.column_warp) * kTileColumns + role.fragment_column;

  ScaleFragment scale;
  if constexpr (kPerColumn) scale.load_per_column(params, role, strip);
  float bias[8] = {};
  if (params.bias != nullptr && warp_column < params.n) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bias[i] = load_element(params.bias, params.bias_dtype, warp_column + 8 * i);
  }

  // The scratch holds the rows of at most four batches of one row warp at a time.
  constexpr int kRows = OutputScratch<kShape>::kRows, kBatches = kRows / 8;
#pragma unroll
  for (int part = 0; part < kShape.rows / kRows; ++part) {
    role.group_barrier();  // whoever used the scratch before is done
    const int first_batch = part * kBatches % Sums<kShape>::kBatches;
    if (role.row_warp == part * kRows / kShape.rows_per_warp()) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int batch = 0; batch < kBatches; ++batch) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = 2 * block + i / 2;  // in units of 8
            const int row = 8 * batch + 2 * role.fragment_pair + i % 2;
            float value = sums.values[block][first_batch + batch].values[i];
            if constexpr (kPerColumn) value *= scale.values[column];
            scratch.rows[row][role.column_warp * kTileColumns + 8 * column +
                              role.fragment_column] = half_bits<Half>(value + bias[column]);
          }
        }
      }
    }
    role.group_barrier();

    constexpr int kChunks = kShape.columns() / 8;  // per row
    auto* y = static_cast<uint16_t*>(params.y);
    for (int i = role.group_thread; i < kRows * kChunks; i += kShape.group_threads()) {
      const int row = i / kChunks, chunk = i % kChunks;
      const int64_t y_row = first_row + part * kRows + row;
      const int64_t column = strip * kTileColumns + 8 * chunk;
      if (y_row < params.m && column < params.n)
        *reinterpret_cast<uint4*>(y + y_row * params.n + column) =
            *reinterpret_cast<const uint4*>(&scratch.rows[row][8 * chunk]);
    }
  }
}

}  // namespace marlin
