// From the sums of tall warps to a finished slice of Y, as finish.cuh does, but added in registers:
//
//   registers --two depth groups swap halves of their rows--> half the rows each
//   --hand over, or add those of other CTAs--> rows in shared memory, each group its own --> Y
//
// So every sum passes through shared memory once on the way to another CTA, not three times, and all of
// a thread's loads from memory are under way at once.
#pragma once

#include "epilogue/bundles.cuh"
#include "epilogue/finish.cuh"

namespace marlin {

// The half of the batches that this depth group goes on with, the other group's sums added.
template <CtaShape kShape, int kBatches>
__device__ Sums<kBatches / 2> add_depth_groups(const Sums<kBatches>& sums, const Role<kShape>& role,
                                               SharedMemory<kShape>& shared, int free_slot) {
  constexpr int kHalf = kBatches / 2;
  using Fours = Bundles<kHalf, kBlocks>;
  static_assert(kShape.depth_groups == 2 && kBatches % 2 == 0 &&
                Fours::kFours * kShape.group_threads() * sizeof(float4) <= sizeof(Stage<kShape>));
  const bool first = role.depth_group == 0;
  Sums<kHalf> kept = half_of(sums, first), given = half_of(sums, !first);
  auto fours_of = [&](int group, int slot) {
    return reinterpret_cast<float4*>(&shared.stages[group][slot]) + role.group_thread;
  };
  if (role.group_thread == 0) shared.free_slots[role.depth_group] = free_slot;
  float4* mine = fours_of(role.depth_group, free_slot);
  Fours::give(given, kShape.rows,
              [&](int i, float4 four) { mine[i * kShape.group_threads()] = four; });
  __syncthreads();
  const int other = role.depth_group ^ 1;
  const float4* theirs = fours_of(other, shared.free_slots[other]);
  Fours::add(kept, kShape.rows, [&](int i) { return theirs[i * kShape.group_threads()]; });
  return kept;
}

// What is left to finish when nobody else has a part.
struct NoOthers {
  __device__ bool owner() const { return true; }
  __device__ int others() const { return 0; }
  __device__ void give(int, int, float4) const {}
  __device__ float4 take(int, int, int) const { return {}; }
};

template <typename Half, bool kPerColumn, CtaShape kShape, int kBatches>
__device__ void finish_tall_slice(const Sums<kBatches>& sums, const Role<kShape>& role,
                                  SharedMemory<kShape>& shared, int free_slot,
                                  const GemmParams& params, const SliceOrigin& origin,
                                  const SliceHandover<kShape>& handover) {
  static_assert(kShape.row_warps == 1);
  constexpr int kMine = kBatches / 2;
  using Fours = Bundles<kMine, kBlocks>;
  role.group_barrier();  // the group's warps have used up the stage
  Sums<kMine> mine = add_depth_groups(sums, role, shared, free_slot);
  const int group_row = role.depth_group * kMine * 8;  // the first of those that it goes on with
  const int64_t rows_left = params.m - origin.row - group_row;

  if (!handover.owner()) {
    Fours::give(mine, rows_left,
                [&](int i, float4 four) { handover.give_raw(i, threadIdx.x, four); });
    __syncthreads();  // what was given is all there, and the stages may be filled again
    if (threadIdx.x == 0) handover.count_myself();
    return;
  }
  if (threadIdx.x == 0) handover.await_others();
  __syncthreads();  // also, the other group has read what this one gave
#pragma unroll 1
  for (int other = 1; other <= handover.others(); ++other)
    Fours::add(mine, rows_left, [&](int i) { return handover.take_raw(other, i, threadIdx.x); });

  using Tile = RowTile<8 * kMine, kShape.columns()>;
  static_assert(sizeof(Tile) <= sizeof(Stage<kShape>));
  const RowFinisher<Half, kPerColumn, Tile, 1, kShape.group_threads()> finisher(params, origin,
                                                                                role.group_thread);
  auto* tile = reinterpret_cast<Tile*>(&shared.stages[role.depth_group][free_slot]);
  tile->lay_out(mine, 0, role.column_warp * kTileColumns + role.fragment_column,
                role.fragment_pair);
  role.group_barrier();
  finisher.finish({tile}, group_row, NoOthers());
}

}  // namespace marlin
