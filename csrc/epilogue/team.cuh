// The threads of the sm_90 engine that finish columns of a slice together.
#pragma once

#include "epilogue/handover.cuh"
#include "format/shared_memory.h"
#include "ptx/barrier.cuh"

namespace marlin {

template <Sm90Shape kShape>
using Sm90Handover = Handover<kShape.rows, kShape.columns * kShape.twins, kShape.all_teams()>;

// Where a thread's sums belong.
struct SumsPlace {
  int team;
  int thread;  // in the team
  int set;     // of consumers: its sums are of every sets-th stage only
  int copy;    // mma.sync: the warp's part of the depth, among all sets
  int column;  // of the lane in block 0, within the team's columns
  int pair;    // mma.sync: of the lane's rows in a batch
};

// Named barriers: one for each team, and one for all consumers.
inline constexpr int kTeamBarrier = 1;
inline constexpr int kConsumersBarrier = 4;

// Waits for the threads of a team.
template <Sm90Shape kShape, int kTeam = 0>
__device__ void team_barrier(int team) {
  static_assert(kTeamBarrier + kShape.teams() <= kConsumersBarrier);
  if constexpr (kTeam + 1 < kShape.teams()) {
    if (team != kTeam) return team_barrier<kShape, kTeam + 1>(team);
  }
  ptx::barrier_sync<kTeamBarrier + kTeam, kShape.team_threads()>();
}

template <Sm90Shape kShape>
__device__ void consumers_barrier() {
  ptx::barrier_sync<kConsumersBarrier, 128 * kShape.consumers()>();
}

}  // namespace marlin
