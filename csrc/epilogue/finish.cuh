// From the sums of all warps to a finished slice of Y, by all threads of the CTA:
//
//   registers --lay out--> rows in shared memory, one copy per depth group
//   --add the copies, a thread eight columns--> --hand over, or scale and add the bias--> Y
//
// The copies lie in the stage that each depth group has just used up, so the copies of the next slice
// go on meanwhile. Where a stage is too small for all rows, they take turns.
#pragma once

#include "epilogue/handover.cuh"
#include "pipeline/elements.cuh"
#include "pipeline/sums.cuh"

namespace marlin {

// Some rows of a slice, laid over a stage. The pad makes rows two apart start 8 banks apart, so that
// the lanes of an accumulator (8 columns by 4 pairs of rows) write without conflicts.
template <CtaShape kShape>
struct RowTile {
  static constexpr int kPitch = kShape.columns() + 4;
  static constexpr int rows_that_fit(int rows) {
    return rows * kPitch * 4 <= static_cast<int>(sizeof(Stage<kShape>)) ? rows
                                                                       : rows_that_fit(rows / 2);
  }
  static constexpr int kRows = rows_that_fit(kShape.rows_per_warp());
  static_assert(kRows >= 8, "a batch of rows fits a stage");

  float sums[kRows][kPitch];

  __device__ void lay_out(const Sums<kShape>& source, const Role<kShape>& role, int first_batch) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int batch = 0; batch < kRows / 8; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[8 * batch + 2 * role.fragment_pair + i % 2]
              [role.column_warp * kTileColumns + 16 * block + i / 2 * 8 + role.fragment_column] =
                  source.values[block][first_batch + batch].values[i];
  }

  __device__ void add_to(float (&total)[8], int row, int column) const {
    const auto* pieces = reinterpret_cast<const float4*>(&sums[row][column]);
    const float4 low = pieces[0], high = pieces[1];
    total[0] += low.x, total[1] += low.y, total[2] += low.z, total[3] += low.w;
    total[4] += high.x, total[5] += high.y, total[6] += high.z, total[7] += high.w;
  }
};

// Eight finished columns of one row: the per-column scale, the bias, one rounding.
template <typename Half, bool kPerColumn>
__device__ void store_eight(const GemmParams& params, int64_t row, int64_t column,
                            const float (&sums)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float value = sums[i];
    if constexpr (kPerColumn)
      value *= load_element(params.scales, params.scale_dtype, scale_position(column + i, true));
    if (params.bias != nullptr) value += load_element(params.bias, params.bias_dtype, column + i);
    const uint32_t bits = half_bits<Half>(value);
    pairs[i / 2] = i % 2 == 0 ? bits : pairs[i / 2] | bits << 16;
  }
  auto* y = static_cast<uint16_t*>(params.y) + row * params.n + column;
  *reinterpret_cast<uint4*>(y) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// The first column and row of Y in a slice.
struct SliceOrigin {
  int64_t row;
  int64_t column;
};

template <typename Half, bool kPerColumn, CtaShape kShape>
__device__ void finish_slice(const Sums<kShape>& sums, const Role<kShape>& role,
                             SharedMemory<kShape>& shared, int free_slot,
                             const GemmParams& params, const SliceOrigin& origin,
                             const Handover<kShape>& handover) {
  constexpr int kRows = RowTile<kShape>::kRows;
  constexpr int kChunks = kShape.columns() / 8;
  auto tile_of = [&](int group, int slot) -> RowTile<kShape>& {
    return reinterpret_cast<RowTile<kShape>&>(shared.stages[group][slot]);
  };
  const int64_t rows_left = params.m - origin.row;
  const int rows = static_cast<int>(rows_left < kShape.rows ? rows_left : kShape.rows);

  role.group_barrier();  // the group's warps have used up the stage
  if (role.group_thread == 0) shared.free_slots[role.depth_group] = free_slot;
  if (handover.owner()) handover.await_others();

#pragma unroll
  for (int first = 0; first < kShape.rows; first += kRows) {
    if (first >= rows) break;
    if (first > 0) __syncthreads();  // the rows before are done with
    if (role.row_warp == first / kShape.rows_per_warp())
      tile_of(role.depth_group, free_slot)
          .lay_out(sums, role, first % kShape.rows_per_warp() / 8);
    __syncthreads();

    const int count = min(kRows, rows - first) * kChunks;
    for (int i = threadIdx.x; i < count; i += kShape.threads()) {
      const int row = i / kChunks, column = i % kChunks * 8;
      if (origin.column + column >= params.n) continue;
      float total[8] = {};
#pragma unroll
      for (int group = 0; group < kShape.depth_groups; ++group)
        tile_of(group, shared.free_slots[group]).add_to(total, row, column);
      if (handover.owner()) {
        handover.add_others(first + row, column, total);
        store_eight<Half, kPerColumn>(params, origin.row + first + row, origin.column + column,
                                      total);
      } else {
        handover.give(first + row, column, total);
      }
    }
  }
  if (!handover.owner()) handover.count_myself();
  __syncthreads();  // the stages may be filled again
}

}  // namespace marlin
