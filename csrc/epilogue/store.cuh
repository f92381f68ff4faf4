// Finished sums to Y: the per-column scale, the bias, one rounding, and whole 16-byte chunks.
#pragma once

#include "pipeline/sums.cuh"
#include "pipeline/elements.cuh"

namespace marlin {

// For the threads of the first depth group.
template <typename Half, ScaleSteps kSteps, CtaShape kShape>
__device__ void store_rows(const Sums<kShape>& sums, const Role<kShape>& role,
                           const GemmParams& params, int64_t strip, int64_t first_row,
                           OutputScratch<kShape>& scratch) {
  const int64_t warp_column = (strip + role.column_warp) * kTileColumns + role.fragment_column;

  ScaleFragment scale;
  if constexpr (kSteps == ScaleSteps::kOnce) scale.load_per_column(params, role, strip);
  float bias[8] = {};
  if (params.bias != nullptr && warp_column < params.n) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      bias[i] = load_element(params.bias, params.bias_dtype, warp_column + 8 * i);
  }

  role.group_barrier();  // the scratch held sums
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int batch = 0; batch < Sums<kShape>::kBatches; ++batch) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, column = 2 * block + half;
        const int row = role.row_warp * kShape.rows_per_warp() + 8 * batch +
                        2 * role.fragment_pair + i % 2;
        float value = sums.values[block][batch].values[i];
        if constexpr (kSteps == ScaleSteps::kOnce) value *= scale.values[column];
        scratch.rows[row][role.column_warp * kTileColumns + 8 * column + role.fragment_column] =
            half_bits<Half>(value + bias[column]);
      }
    }
  }
  role.group_barrier();

  constexpr int kChunks = kShape.columns() / 8;  // per row
  auto* y = static_cast<uint16_t*>(params.y);
  for (int i = role.group_thread; i < kShape.rows * kChunks; i += kShape.group_threads()) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t y_row = first_row + row, column = strip * kTileColumns + 8 * chunk;
    if (y_row < params.m && column < params.n)
      *reinterpret_cast<uint4*>(y + y_row * params.n + column) =
          *reinterpret_cast<const uint4*>(&scratch.rows[row][8 * chunk]);
  }
}

}  // namespace marlin
