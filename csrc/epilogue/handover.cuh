// How CTAs that share a slice hand over their partial sums, in the order of their runs, in FP32.
//
// A run that does not own the slice writes its sums to its buffer and counts itself on the owner's
// counter. The owner waits for the count, adds, and sets the counter back to zero: every launch
// leaves the counters as it found them.
//
// Block b takes run runs - 1 - b, the twins 2 b and 2 b + 1 do. The owner has the lowest run of its
// slice, so it waits only for blocks of lower index, which were scheduled before it: no deadlock
// however few CTAs fit the GPU.
#pragma once

#include "core/gemm.h"
#include "ptx/barrier.cuh"

namespace marlin {

__device__ inline int run_of_block(const Partition& partition, int ctas = 1) {
  return partition.runs - 1 - static_cast<int>(blockIdx.x) / ctas;
}

// kTeams of kTeamThreads may finish their own columns of a slice each by itself.
template <int kRows, int kColumns, int kTeams = 1, int kTeamThreads = 128>
class Handover {
 public:
  __device__ Handover(const Workspace& workspace, const Sharing& sharing, int run, int team = 0)
      : run_partials_(static_cast<float*>(workspace.partials) + int64_t{run} * kElements),
        team_(team),
        counter_(workspace.counters + ((run - sharing.order) * kTeams + team)),
        sharing_(sharing) {}

  __device__ bool owner() const { return sharing_.owner(); }

  // Of the owner, by one thread before a barrier: all others have counted themselves.
  __device__ void await_others() const {
    if (!sharing_.shared()) return;
    while (ptx::load_acquire(counter_) != static_cast<uint32_t>(sharing_.contributors - 1)) {
    }
    *counter_ = 0;
  }

  __device__ int others() const { return sharing_.contributors - 1; }

  // Of the others, by one thread after a barrier: what they gave is all there is. The release covers
  // what the barrier made its thread see, everybody's writes.
  __device__ void count_myself() const { ptx::add_release(counter_, 1); }

  // The index-th four sums of a thread of the team, as its registers hold them.
  __device__ void give_raw(int index, int thread, float4 sums) const {
    __stcg(raw_place(0, index, thread), sums);
  }
  __device__ float4 take_raw(int other, int index, int thread) const {
    return __ldcg(raw_place(other, index, thread));
  }

  // Four neighbouring sums of a row of the slice.
  __device__ void give(int row, int column, float4 sums) const {
    __stcg(reinterpret_cast<float4*>(place(0, row, column)), sums);
  }
  __device__ float4 take(int other, int row, int column) const {
    return __ldcg(reinterpret_cast<const float4*>(place(other, row, column)));
  }

 private:
  static constexpr int64_t kElements = kRows * kColumns;

  __device__ float4* raw_place(int other, int index, int thread) const {
    return reinterpret_cast<float4*>(run_partials_ + other * kElements) +
           (team_ * kElements / kTeams / 4 + index * kTeamThreads + thread);
  }

  __device__ float* place(int other, int row, int column) const {
    return run_partials_ + other * kElements + row * kColumns + team_ * (kColumns / kTeams) +
           column;
  }

  float* run_partials_;
  int team_;
  uint32_t* counter_;
  Sharing sharing_;
};

}  // namespace marlin
