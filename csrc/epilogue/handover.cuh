// How CTAs that share a slice hand over their partial sums, in the order of their runs, in FP32.
//
// A run that does not own the slice writes its sums to its buffer and counts itself on the owner's
// counter. The owner waits for the count, adds, and sets the counter back to zero: every launch
// leaves the counters as it found them.
//
// Block b takes run runs - 1 - b. The owner has the lowest run of its slice, so it waits only for
// blocks of lower index, which were scheduled before it: no deadlock however few CTAs fit the GPU.
#pragma once

#include "core/gemm.h"
#include "pipeline/stage.cuh"
#include "ptx/barrier.cuh"

namespace marlin {

__device__ inline int run_of_block(const Partition& partition) {
  return partition.runs - 1 - static_cast<int>(blockIdx.x);
}

template <CtaShape kShape>
class Handover {
 public:
  __device__ Handover(const Workspace& workspace, const Sharing& sharing, int run)
      : partials_(static_cast<float*>(workspace.partials) + int64_t{run} * kElements),
        counter_(workspace.counters + (run - sharing.order)),
        sharing_(sharing) {}

  __device__ bool owner() const { return sharing_.owner(); }

  // Of the owner, for the whole CTA: all others have counted themselves.
  __device__ void await_others() const {
    if (!sharing_.shared()) return;
    if (threadIdx.x == 0) {
      while (ptx::load_acquire(counter_) != static_cast<uint32_t>(sharing_.contributors - 1)) {
      }
      *counter_ = 0;
    }
    __syncthreads();
  }

  // Of the others, for the whole CTA: what they gave is all there is. The release covers what the
  // barrier made its thread see, everybody's writes.
  __device__ void count_myself() const {
    __syncthreads();
    if (threadIdx.x == 0) ptx::add_release(counter_, 1);
  }

  // Eight neighbouring sums of a row of the slice.
  __device__ void give(int row, int column, const float (&sums)[8]) const {
    float* place = partials_ + row * kShape.columns() + column;
    __stcg(reinterpret_cast<float4*>(place), {sums[0], sums[1], sums[2], sums[3]});
    __stcg(reinterpret_cast<float4*>(place + 4), {sums[4], sums[5], sums[6], sums[7]});
  }

  __device__ void add_others(int row, int column, float (&sums)[8]) const {
    const float* place = partials_ + row * kShape.columns() + column;
#pragma unroll 3
    for (int other = 1; other < sharing_.contributors; ++other) {
      const float* theirs = place + int64_t{other} * kElements;
      const float4 low = __ldcg(reinterpret_cast<const float4*>(theirs));
      const float4 high = __ldcg(reinterpret_cast<const float4*>(theirs + 4));
      sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
      sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
    }
  }

 private:
  static constexpr int64_t kElements = kShape.rows * kShape.columns();

  float* partials_;  // of this run
  uint32_t* counter_;
  Sharing sharing_;
};

}  // namespace marlin
