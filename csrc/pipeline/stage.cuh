// A thread's place in its CTA.
#pragma once

#include <type_traits>

#include "core/gemm.h"
#include "format/shared_memory.h"
#include "ptx/barrier.cuh"

namespace marlin {

template <CtaShape kShape>
struct Role {
  int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32 % kShape.group_warps();  // within its depth group
  int column_warp = warp % kShape.column_warps;
  int row_warp = warp / kShape.column_warps;
  int depth_group = threadIdx.x / kShape.group_threads();
  int group_thread = threadIdx.x % kShape.group_threads();

  // In an mma fragment: a column of W (and the one 8 further), and a pair of rows of X or W.
  int fragment_column = lane / 4;
  int fragment_pair = lane % 4;

  __device__ Role() {}

  // Waits for the threads of this depth group.
  __device__ void group_barrier() const { barrier_of_group(std::integral_constant<int, 0>{}); }

 private:
  template <int kGroup>
  __device__ void barrier_of_group(std::integral_constant<int, kGroup>) const {
    if (depth_group == kGroup) {
      ptx::barrier_sync<1 + kGroup, kShape.group_threads()>();
    } else if constexpr (kGroup + 1 < kShape.depth_groups) {
      barrier_of_group(std::integral_constant<int, kGroup + 1>{});
    }
  }
};

}  // namespace marlin
