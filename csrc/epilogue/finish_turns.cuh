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
  ptx::barrier_sync<kTeamBarrier + kTeam, 128 * kShape.consumers() / kShape.teams()>();
}

template <Sm90Shape kShape>
__device__ TurnRows<kShape>* rows_of_team(Sm90Shared<kShape>& shared, int team) {
  return reinterpret_cast<TurnRows<kShape>*>(shared.finished) + team * Sm90Shared<kShape>::kCopies;
}

// Nobody else: what a finisher hears where no other CTA's sums come through global memory.
struct NoHandover {
  __device__ bool owner() const { return true; }
  __device__ int others() const { return 0; }
  __device__ float4 take(int, int, int) const { return {}; }
  __device__ void give(int, int, float4) const {}
  __device__ void await_others() const {}
  __device__ void count_myself() const {}
};

template <typename Half, bool kPerColumn, Sm90Shape kShape, typename Handover, int kBatches,
          int kCount>
__device__ void finish_in_turns(const Sums<kBatches, kCount>& sums, const SumsPlace& place,
                                Sm90Shared<kShape>& shared, const GemmParams& params,
                                const SliceOrigin& origin, const Handover& handover) {
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

// What finish_in_turns does for a pair of CTAs that share every slice: the second leaves its rows where they are, and
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

// Many sums would take many turns. Where a team is one warpgroup, the others' are added in registers
// before the turns, all at once, from where their threads left them in the same order.
template <int kBatches, int kCount, typename Move>
__device__ void for_each_four(Sums<kBatches, kCount>& sums, int64_t rows_left, const Move& move) {
#pragma unroll
  for (int batch = 0; batch < kBatches; ++batch) {
    if (8 * batch >= rows_left) break;
#pragma unroll
    for (int block = 0; block < kCount; ++block)
      move(batch * kCount + block, reinterpret_cast<float4&>(sums.values[block][batch]));
  }
}

// Over global memory. Returns whether this CTA is to finish the slice.
template <Sm90Shape kShape, int kBatches, int kCount>
__device__ bool add_others(Sums<kBatches, kCount>& sums, const SumsPlace& place, int64_t rows_left,
                           const Sm90Handover<kShape>& handover) {
  if (!handover.owner()) {
    for_each_four(sums, rows_left,
                  [&](int i, float4& four) { handover.give_raw(i, place.thread, four); });
    team_barrier<kShape>(place.team);
    if (place.thread == 0) handover.count_myself();
    return false;
  }
  if (handover.others() == 0) return true;
  if (place.thread == 0) handover.await_others();
  team_barrier<kShape>(place.team);
  for (int other = 1; other <= handover.others(); ++other)
    for_each_four(sums, rows_left, [&](int i, float4& four) {
      four = four + handover.take_raw(other, i, place.thread);
    });
  return true;
}

// Over the shared memory of the pair, whose rings are not needed any more.
template <Sm90Shape kShape, int kBatches, int kCount>
__device__ bool add_partner(Sums<kBatches, kCount>& sums, const SumsPlace& place, int64_t rows_left,
                            Sm90Shared<kShape>& shared, bool owner) {
  constexpr int kFours = kBatches * kCount;
  static_assert(kShape.teams() * kFours * 128 * sizeof(float4) <= sizeof(shared.activations));
  auto* fours = reinterpret_cast<float4*>(shared.activations) + place.team * kFours * 128;
  ptx::Mbarrier* heard = &shared.partner[place.team];
  const uint32_t partner = ptx::cluster_rank() ^ 1;
  if (owner) {
    ptx::mbarrier_wait_remote(heard, 0);  // theirs are laid out
    const float4* theirs = ptx::in_cluster(fours, partner);
    for_each_four(sums, rows_left,
                  [&](int i, float4& four) { four = four + theirs[i * 128 + place.thread]; });
    team_barrier<kShape>(place.team);
    if (place.thread == 0) ptx::mbarrier_arrive_remote(heard, partner);
    return true;
  }
  ptx::barrier_sync<kConsumersBarrier,
                    128 * kShape.consumers()>();  // all teams are done with the ring
  for_each_four(sums, rows_left,
                [&](int i, float4& four) { fours[i * 128 + place.thread] = four; });
  team_barrier<kShape>(place.team);
  if (place.thread == 0) ptx::mbarrier_arrive_remote(heard, partner);
  ptx::mbarrier_wait_remote(heard, 0);  // and were read
  return false;
}

}  // namespace marlin
