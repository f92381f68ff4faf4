// Adds the sums of a CTA's depth groups to the first group's, one after the other.
#pragma once

#include "pipeline/sums.cuh"

namespace marlin {

template <CtaShape kShape>
__device__ void reduce_groups(Sums<kShape>& sums, const Role<kShape>& role,
                              SumsScratch<kShape>& scratch) {
  constexpr int kAtOnce = SumsScratch<kShape>::kPieces;
#pragma unroll
  for (int other = 1; other < kShape.depth_groups; ++other) {
#pragma unroll
    for (int first = 0; first < Sums<kShape>::kPieces; first += kAtOnce) {
      __syncthreads();  // whoever used the scratch before is done
      if (role.depth_group == other) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          scratch.pieces[i][role.group_thread] = as_chunk(sums.piece(first + i));
      }
      __syncthreads();
      if (role.depth_group == 0) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          sums.add_piece(first + i, as_float4(scratch.pieces[i][role.group_thread]));
      }
    }
  }
}

}  // namespace marlin
