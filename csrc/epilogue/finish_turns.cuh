// The sm_90 engine's way from the sums of a team of warps to a finished slice of Y. The rings go on
// filling meanwhile, so rows are laid out in memory of their own, a few at a time:
//
//   registers --lay out--> kTurnRows rows, one copy per part of the depth
//   --add the copies, four columns a thread--> --hand over, or scale and add the bias--> Y
#pragma once

#include "epilogue/rows.cuh"
#include "format/shared_memory.h"
#include "ptx/barrier.cuh"

namespace marlin {

template <Sm90Shape kShape>
using TurnRows = RowTile<Sm90Shared<kShape>::kTurnRows, Sm90Shared<kShape>::kTeamColumns>;

template <Sm90Shape kShape>
using Sm90Handover = Handover<kShape.rows, kShape.columns, kShape.teams()>;

constexpr int power_of_two_within(int value) {
  return value < 2 ? 1 : 2 * power_of_two_within(value / 2);
}

// Where a warp's sums belong.
struct SumsPlace {
  int team;
  int thread;  // in the team
  int copy;
  int column;  // of the lane in block 0, within the team's columns
  int pair;
};

// Waits for the threads of a team.
template <Sm90Shape kShape>
__device__ void team_barrier(int team) {
  constexpr int kThreads = 128 * kShape.consumers() / kShape.teams();
  static_assert(kShape.teams() <= 2);
  if (kShape.teams() == 1 || team == 0) ptx::barrier_sync<1, kThreads>();
  else ptx::barrier_sync<2, kThreads>();
}

template <typename Half, bool kPerColumn, Sm90Shape kShape, int kBatches, int kCount>
__device__ void finish_in_turns(const Sums<kBatches, kCount>& sums, const SumsPlace& place,
                                Sm90Shared<kShape>& shared, const GemmParams& params,
                                const SliceOrigin& origin, const Sm90Handover<kShape>& handover) {
  using Rows = TurnRows<kShape>;
  constexpr int kCopies = Sm90Shared<kShape>::kCopies;
  constexpr int kThreads = power_of_two_within(128 * kShape.consumers() / kShape.teams());
  auto* tiles = reinterpret_cast<Rows*>(shared.sums[place.team]);
  const Rows* copies[kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) copies[i] = &tiles[i];
  const RowFinisher<Half, kPerColumn, Rows, kCopies, kThreads> finisher(params, origin,
                                                                        place.thread);
#pragma unroll
  for (int first = 0; first < kShape.rows; first += Rows::kRows) {
    if (origin.row + first >= params.m) break;
    tiles[place.copy].lay_out(sums, first / 8, place.column, place.pair);
    if (first == 0 && place.thread == 0 && handover.owner()) handover.await_others();
    team_barrier<kShape>(place.team);
    if (place.thread < kThreads) finisher.finish(copies, first, handover);
    team_barrier<kShape>(place.team);  // the rows may be overwritten; what was given is all there
  }
  if (place.thread == 0 && !handover.owner()) handover.count_myself();
}

}  // namespace marlin
