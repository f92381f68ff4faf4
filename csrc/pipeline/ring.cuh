// A ring of stages between producers and consumers: two mbarriers per stage, and a place in the ring.
#pragma once

#include "format/shared_memory.h"
#include "ptx/mbarrier.cuh"

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

template <Sm90Shape kShape>
__device__ void init_ring(Sm90Shared<kShape>& shared, int producers) {
  for (int i = 0; i < kShape.stages; ++i) {
    ptx::mbarrier_init(&shared.full[i], producers);
    ptx::mbarrier_init(&shared.empty[i], 4 * kShape.set_warpgroups());
    ptx::mbarrier_init(&shared.scales_full[i], 1);
  }
  for (int i = 0; i < kShape.teams(); ++i) ptx::mbarrier_init(&shared.partner[i], 1);
  ptx::mbarrier_init_fence();
}

}  // namespace marlin
