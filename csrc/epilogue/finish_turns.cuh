// The sm_90 engine's way from the sums of a team of warps to a finished slice of Y. The rings go on
// filling meanwhile, so rows are laid out in memory of their own, a few at a time:
//
//   registers --lay out--> kTurnRows rows, one copy per part of the depth
//   --add the copies, four columns a thread--> --hand over, or scale and add the bias--> Y
#pragma once

#include "epilogue/rows.cuh"
#include "format/shared_memory.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"

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

template <Sm90Shape kShape>
__device__ TurnRows<kShape>* rows_of_team(Sm90Shared<kShape>& shared, int team) {
  return reinterpret_cast<TurnRows<kShape>*>(shared.sums[team]);
}

template <typename Half, bool kPerColumn, Sm90Shape kShape, int kBatches, int kCount>
__device__ void finish_in_turns(const Sums<kBatches, kCount>& sums, const SumsPlace& place,
                                Sm90Shared<kShape>& shared, const GemmParams& params,
                                const SliceOrigin& origin, const Sm90Handover<kShape>& handover) {
  using Rows = TurnRows<kShape>;
  constexpr int kCopies = Sm90Shared<kShape>::kCopies;
  constexpr int kThreads = power_of_two_within(128 * kShape.consumers() / kShape.teams());
  Rows* tiles = rows_of_team<kShape>(shared, place.team);
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

// Nobody else: what a finisher hears where no other CTA's sums come through global memory.
struct NoHandover {
  __device__ bool owner() const { return true; }
  __device__ int others() const { return 0; }
  __device__ float4 take(int, int, int) const { return {}; }
  __device__ void give(int, int, float4) const {}
};

// The same for a pair of CTAs that share every slice: the second leaves its rows where they are, and
// the first reads them there.
template <typename Half, bool kPerColumn, Sm90Shape kShape, int kBatches, int kCount>
__device__ void finish_in_pairs(const Sums<kBatches, kCount>& sums, const SumsPlace& place,
                                Sm90Shared<kShape>& shared, const GemmParams& params,
                                const SliceOrigin& origin, bool owner) {
  using Rows = TurnRows<kShape>;
  constexpr int kCopies = Sm90Shared<kShape>::kCopies;
  constexpr int kThreads = power_of_two_within(128 * kShape.consumers() / kShape.teams());
  const uint32_t partner = ptx::cluster_rank() ^ 1;
  ptx::Mbarrier* heard = &shared.partner[place.team];
  Rows* tiles = rows_of_team<kShape>(shared, place.team);
  const Rows* remote = ptx::in_cluster(tiles, partner);
  const Rows* copies[2 * kCopies];
#pragma unroll
  for (int i = 0; i < kCopies; ++i) copies[i] = &tiles[i], copies[kCopies + i] = &remote[i];
  const RowFinisher<Half, kPerColumn, Rows, 2 * kCopies, kThreads> finisher(params, origin,
                                                                            place.thread);
  uint32_t parity = 0;
#pragma unroll
  for (int first = 0; first < kShape.rows; first += Rows::kRows) {
    if (origin.row + first >= params.m) break;
    tiles[place.copy].lay_out(sums, first / 8, place.column, place.pair);
    team_barrier<kShape>(place.team);
    if (!owner && place.thread == 0) ptx::mbarrier_arrive_remote(heard, partner);
    ptx::mbarrier_wait_remote(heard, parity);  // theirs are laid out; or read
    if (owner) {
      if (place.thread < kThreads) finisher.finish(copies, first, NoHandover{});
      team_barrier<kShape>(place.team);
      if (place.thread == 0) ptx::mbarrier_arrive_remote(heard, partner);
    }
    parity ^= 1;
  }
}

}  // namespace marlin
