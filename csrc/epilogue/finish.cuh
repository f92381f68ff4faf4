// From the sums of all warps to a finished slice of Y, by all threads of the CTA:
//
//   registers --lay out--> rows in shared memory, one copy per depth group
//   --add the copies, four columns a thread--> --hand over, or scale and add the bias--> Y
//
// The copies lie in the stage that each depth group has just used up, so the copies of the next slice
// go on meanwhile. Where a stage is too small for all rows, they take turns.
#pragma once

#include "epilogue/rows.cuh"
#include "pipeline/stage.cuh"

namespace marlin {

// As many of a warp's rows as fit over a stage.
template <CtaShape kShape>
constexpr int rows_in_a_stage(int rows = kShape.rows_per_warp()) {
  const bool fit = rows * (kShape.columns() + 4) * 4 <= static_cast<int>(sizeof(Stage<kShape>));
  return fit ? rows : rows_in_a_stage<kShape>(rows / 2);
}

template <CtaShape kShape>
using StageRows = RowTile<rows_in_a_stage<kShape>(), kShape.columns()>;

template <CtaShape kShape>
using SliceHandover = Handover<kShape.rows, kShape.columns(), 1, kShape.threads()>;

template <typename Half, bool kPerColumn, CtaShape kShape, int kBatches>
__device__ void finish_slice(const Sums<kBatches>& sums, const Role<kShape>& role,
                             SharedMemory<kShape>& shared, int free_slot, const GemmParams& params,
                             const SliceOrigin& origin, const SliceHandover<kShape>& handover) {
  constexpr int kRows = StageRows<kShape>::kRows;
  static_assert(kRows >= 8 && kRows % 8 == 0, "whole batches of rows fit a stage");
  const RowFinisher<Half, kPerColumn, StageRows<kShape>, kShape.depth_groups, kShape.threads()>
      finisher(params, origin, threadIdx.x);
  const int column = role.column_warp * kTileColumns + role.fragment_column;
  auto tile_of = [&](int group, int slot) {
    return reinterpret_cast<StageRows<kShape>*>(&shared.stages[group][slot]);
  };

  role.group_barrier();  // the group's warps have used up the stage
  if (role.group_thread == 0) shared.free_slots[role.depth_group] = free_slot;
#pragma unroll
  for (int first = 0; first < kShape.rows; first += kRows) {
    if (origin.row + first >= params.m) break;
    if (first > 0) __syncthreads();  // the rows before are done with
    if (role.row_warp == first / kShape.rows_per_warp())
      tile_of(role.depth_group, free_slot)
          ->lay_out(sums, first % kShape.rows_per_warp() / 8, column, role.fragment_pair);
    if (first == 0 && threadIdx.x == 0 && handover.owner()) handover.await_others();
    __syncthreads();

    const StageRows<kShape>* copies[kShape.depth_groups];
#pragma unroll
    for (int group = 0; group < kShape.depth_groups; ++group)
      copies[group] = tile_of(group, shared.free_slots[group]);
    finisher.finish(copies, first, handover);
  }
  __syncthreads();  // the stages may be filled again, and what was given is all there
  if (threadIdx.x == 0 && !handover.owner()) handover.count_myself();
}

}  // namespace marlin
