// The sums of a wgmma warpgroup grow, in registers, by what others have of the same slice: the other
// sets of the CTA, then other CTAs, in the order of their runs. Others leave their sums as their threads
// hold them, four at a time.
#pragma once

#include "epilogue/bundles.cuh"
#include "epilogue/team.cuh"
#include "ptx/cluster.cuh"

namespace marlin {

// Of the sets of the CTA, over its shared memory. Returns whether this set goes on with the sums.
template <Sm90Shape kShape, int kBatches, int kCount>
__device__ bool add_sets(Sums<kBatches, kCount>& sums, const SumsPlace& place, int64_t rows_left,
                         Sm90Shared<kShape>& shared) {
  if constexpr (kShape.sets == 1) return true;
  using Fours = Bundles<kBatches, kCount>;
  constexpr int kTeamFours = Fours::kFours * 128;
  auto fours_of = [&](int set) {
    return reinterpret_cast<float4*>(shared.finished) +
           ((set - 1) * kShape.teams() + place.team) * kTeamFours + place.thread;
  };
  consumers_barrier<kShape>();  // set 0 has stored what lay there
  if (place.set > 0)
    Fours::give(sums, rows_left,
                [mine = fours_of(place.set)](int i, float4 four) { mine[i * 128] = four; });
  consumers_barrier<kShape>();  // no set is in the ring any more
  if (place.set > 0) return false;
#pragma unroll
  for (int set = 1; set < kShape.sets; ++set)
    Fours::add(sums, rows_left, [theirs = fours_of(set)](int i) { return theirs[i * 128]; });
  team_barrier<kShape>(place.team);  // the same memory takes the finished rows
  return true;
}

// Of other CTAs, over global memory. Returns whether this CTA is to finish the slice.
template <Sm90Shape kShape, int kBatches, int kCount>
__device__ bool add_others(Sums<kBatches, kCount>& sums, const SumsPlace& place, int64_t rows_left,
                           const Sm90Handover<kShape>& handover) {
  using Fours = Bundles<kBatches, kCount>;
  if (!handover.owner()) {
    Fours::give(sums, rows_left,
                [&](int i, float4 four) { handover.give_raw(i, place.thread, four); });
    team_barrier<kShape>(place.team);
    if (place.thread == 0) handover.count_myself();
    return false;
  }
  if (handover.others() == 0) return true;
  if (place.thread == 0) handover.await_others();
  team_barrier<kShape>(place.team);
#pragma unroll 1
  for (int other = 1; other <= handover.others(); ++other)
    Fours::add(sums, rows_left, [&](int i) { return handover.take_raw(other, i, place.thread); });
  return true;
}

// Of the other CTA of a pair: each goes on with half of the rows, the owner with the first, and writes its
// sums of the others into the other's ring, which is not needed any more; a barrier there counts the bytes.
// Neither reads the other's memory, so each may leave when it has the other's signal and sums.
template <Sm90Shape kShape, int kBatches, int kCount>
__device__ Sums<kBatches / 2, kCount> add_partner(const Sums<kBatches, kCount>& sums,
                                                  const SumsPlace& place, int64_t rows_left,
                                                  Sm90Shared<kShape>& shared, bool owner) {
  using Fours = Bundles<kBatches / 2, kCount>;
  constexpr int kTeamFours = Fours::kFours * 128;
  static_assert(kShape.teams() * kTeamFours * sizeof(float4) <= sizeof(shared.activations));
  auto* fours =
      reinterpret_cast<float4*>(shared.activations) + place.team * kTeamFours + place.thread;
  ptx::Mbarrier* free = &shared.partner_free[place.team];
  ptx::Mbarrier* arrived = &shared.partner_sums[place.team];
  const uint32_t partner = ptx::cluster_rank() ^ 1;
  const int64_t last_rows_left = rows_left - kShape.rows / 2;
  const int64_t mine_left = owner ? rows_left : last_rows_left;
  if constexpr (kShape.sets == 1) consumers_barrier<kShape>();  // all teams are done with the ring
  if (place.thread == 0) {
    ptx::mbarrier_arrive_expect(arrived,
                                Fours::count(mine_left) * 128 * static_cast<int>(sizeof(float4)));
    ptx::mbarrier_signal_remote(free, partner);
  }
  Sums<kBatches / 2, kCount> given = half_of(sums, !owner);
  ptx::mbarrier_wait(free, 0);  // also with nothing to give: the signal must find this CTA here
  Fours::give(given, owner ? last_rows_left : rows_left, [&](int i, float4 four) {
    ptx::store_remote(&fours[i * 128], arrived, partner, four);
  });
  Sums<kBatches / 2, kCount> kept = half_of(sums, owner);
  ptx::mbarrier_wait_remote(arrived, 0);
  Fours::add(kept, mine_left, [&](int i) { return fours[i * 128]; });
  return kept;
}

}  // namespace marlin
