// Adds the partial sums of the CTAs that share a slice, in the order of their runs, in FP32.
//
// A run that does not own the slice writes its sums to its buffer and counts itself on the owner's
// counter; the owner, when it gets there, waits for the count, adds, and sets the counter back to
// zero, so that every launch leaves the workspace as it found it.
//
// Block b takes run runs - 1 - b. The owner has the lowest run of its slice, so it waits only for
// blocks of lower index, which were scheduled before it: no deadlock however few CTAs fit the GPU.
#pragma once

#include "core/gemm.h"
#include "pipeline/sums.cuh"
#include "ptx/barrier.cuh"

namespace marlin {

__device__ inline int run_of_block(const Partition& partition) {
  return partition.runs - 1 - static_cast<int>(blockIdx.x);
}

// For the threads of the first depth group. Returns whether the sums are complete here, that is,
// whether this run owns the slice.
template <CtaShape kShape>
__device__ bool reduce_slice(Sums<kShape>& sums, const Role<kShape>& role, const Sharing& sharing,
                             int run, const Workspace& workspace) {
  if (!sharing.shared()) return true;
  constexpr int kThreads = kShape.group_threads(), kPieces = Sums<kShape>::kPieces;
  auto* partials = static_cast<float4*>(workspace.partials);
  uint32_t* counter = workspace.counters + (run - sharing.order);

  if (!sharing.owner()) {
    float4* mine = partials + int64_t{run} * kPieces * kThreads + role.group_thread;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) __stcg(mine + i * kThreads, sums.piece(i));
    role.group_barrier();
    // The release covers what the barrier made this thread see: everybody's partial sums.
    if (role.group_thread == 0) ptx::add_release(counter, 1);
    return false;
  }

  if (role.group_thread == 0) {
    const auto others = static_cast<uint32_t>(sharing.contributors - 1);
    while (ptx::load_acquire(counter) != others) {
    }
    *counter = 0;
  }
  role.group_barrier();
  for (int other = 1; other < sharing.contributors; ++other) {
    const float4* theirs =
        partials + int64_t{run + other} * kPieces * kThreads + role.group_thread;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sums.add_piece(i, __ldcg(theirs + i * kThreads));
  }
  return true;
}

}  // namespace marlin
