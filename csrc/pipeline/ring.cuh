// A ring of stages between producers and consumers: two mbarriers per stage, and a place in the ring.
#pragma once

#include "format/shared_memory.h"
#include "ptx/cluster.cuh"

namespace marlin {

// The stages that somebody visits: every kStep-th of kStages, beginning with `first`. Whoever visits
// a stage again knows by the parity which round it is.
template <int kStages, int kStep>
struct RingPlace {
  static_assert(kStages % kStep == 0, "a stage belongs to one set of consumers for ever");

  int slot;
  uint32_t parity = 0;

  __device__ explicit RingPlace(int first) : slot(first) {}
  __device__ void advance() {
    slot += kStep;
    if (slot >= kStages) {
      slot -= kStages;
      parity ^= 1;
    }
  }
};

// The CTA among its twins.
template <Sm90Shape kShape>
__device__ int twin_rank() {
  return kShape.twins == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
}

// One lane arrives for its warp. Racecheck takes that for a race of the other lanes, since the compiler
// leaves a __syncwarp() out where lanes are together anyway: built for it, all arrive.
#ifdef MARLIN_RACECHECK
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif

// By a whole warp: what its lanes did is done.
__device__ inline void arrive_together(ptx::Mbarrier* barrier, int lane) {
  __syncwarp();
  if (lane < kWarpArrivals) ptx::mbarrier_arrive(barrier);
}

// By a consumer warp: it needs the stage no more; none if `slot` is negative. Twins fill it together,
// so both hear. (The only branch is around the arrival: wgmma products may be under way.)
template <Sm90Shape kShape>
__device__ void give_back(Sm90Shared<kShape>& shared, int slot, int lane) {
  __syncwarp();  // every lane has read what it needs
  if (slot < 0 || lane >= kWarpArrivals) return;
  ptx::mbarrier_arrive(&shared.empty[slot]);
  if constexpr (kShape.twins > 1)
    ptx::mbarrier_signal_remote(&shared.empty[slot], ptx::cluster_rank() ^ 1);
}

template <Sm90Shape kShape>
__device__ void init_ring(Sm90Shared<kShape>& shared, int producers) {
  for (int i = 0; i < kShape.stages; ++i) {
    ptx::mbarrier_init(&shared.full[i], producers);
    ptx::mbarrier_init(&shared.empty[i],
                       kWarpArrivals * 4 * kShape.set_warpgroups() * kShape.twins);
    ptx::mbarrier_init(&shared.scales_full[i], 1);
  }
  for (int i = 0; i < kShape.teams(); ++i) {
    ptx::mbarrier_init(&shared.partner_free[i], 1);
    ptx::mbarrier_init(&shared.partner_sums[i], 1);
  }
  ptx::mbarrier_init_fence();
}

}  // namespace marlin
