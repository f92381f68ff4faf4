// The sums of a wgmma warpgroup grow, in registers, by what others have of the same slice: the other
// sets of the CTA, then other CTAs, in the order of their runs. Others leave their sums as their threads
// hold them, four at a time.
#pragma once

#include "epilogue/team.cuh"
#include "pipeline/sums.cuh"
#include "ptx/cluster.cuh"

namespace marlin {

// The fours of a thread go in bundles: those of rows that do not exist may be left out, and all loads of
// a bundle come before its first addition, since memory takes its time, however many ask.
template <int kBatches, int kCount>
struct Bundles {
  static constexpr int kFours = kBatches * kCount;
  static constexpr int kLength = kFours <= 16 ? kFours : kFours % 16 == 0 ? 16 : 12;
  static_assert(kFours % kLength == 0);

  static __device__ float4& four(Sums<kBatches, kCount>& sums, int i) {
    return reinterpret_cast<float4&>(sums.values[i % kCount][i / kCount]);
  }
  static __device__ bool exists(int first, int64_t rows_left) {
    return 8 * (first / kCount) < rows_left;
  }

  // sums += load(i) for every i.
  template <typename Load>
  static __device__ void add(Sums<kBatches, kCount>& sums, int64_t rows_left, const Load& load) {
#pragma unroll
    for (int first = 0; first < kFours; first += kLength) {
      if (!exists(first, rows_left)) break;
      float4 theirs[kLength];
#pragma unroll
      for (int i = 0; i < kLength; ++i) theirs[i] = load(first + i);
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        float4& mine = four(sums, first + i);
        mine = mine + theirs[i];
      }
    }
  }

  // store(i, four) for every i.
  template <typename Store>
  static __device__ void give(Sums<kBatches, kCount>& sums, int64_t rows_left, const Store& store) {
#pragma unroll
    for (int first = 0; first < kFours; first += kLength) {
      if (!exists(first, rows_left)) break;
#pragma unroll
      for (int i = first; i < first + kLength; ++i) store(i, four(sums, i));
    }
  }
};

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

// Of the other CTA of a pair, over its ring, which is not needed any more.
template <Sm90Shape kShape, int kBatches, int kCount>
__device__ bool add_partner(Sums<kBatches, kCount>& sums, const SumsPlace& place, int64_t rows_left,
                            Sm90Shared<kShape>& shared, bool owner) {
  using Fours = Bundles<kBatches, kCount>;
  constexpr int kTeamFours = Fours::kFours * 128;
  static_assert(kShape.teams() * kTeamFours * sizeof(float4) <= sizeof(shared.activations));
  auto* fours =
      reinterpret_cast<float4*>(shared.activations) + place.team * kTeamFours + place.thread;
  ptx::Mbarrier* heard = &shared.partner[place.team];
  const uint32_t partner = ptx::cluster_rank() ^ 1;
  if (owner) {
    ptx::mbarrier_wait_remote(heard, 0);  // theirs are laid out
    const float4* theirs = ptx::in_cluster(fours, partner);
    Fours::add(sums, rows_left, [&](int i) { return theirs[i * 128]; });
    team_barrier<kShape>(place.team);
    if (place.thread == 0) ptx::mbarrier_arrive_remote(heard, partner);
    return true;
  }
  if constexpr (kShape.sets == 1) consumers_barrier<kShape>();  // all teams are done with the ring
  Fours::give(sums, rows_left, [&](int i, float4 four) { fours[i * 128] = four; });
  team_barrier<kShape>(place.team);
  if (place.thread == 0) ptx::mbarrier_arrive_remote(heard, partner);
  ptx::mbarrier_wait_remote(heard, 0);  // and were read
  return false;
}

}  // namespace marlin
