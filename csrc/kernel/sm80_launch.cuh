// Host side of one shape of the sm_80 engine; included by kernel/instances/ only.
#pragma once

#include "kernel/allow_shared_memory.cuh"
#include "kernel/sm80.cuh"
#include "kernel/sm80_launch.h"

namespace marlin {

template <size_t kIndex, typename Half, int kGroups>
cudaError_t launch_instance(const LaunchParams& params, cudaStream_t stream) {
  constexpr CtaShape kShape = kSm80Shapes[kIndex].shape;
  constexpr int kBytes = static_cast<int>(kSm80SharedBytes[kIndex]);
  constexpr auto kKernel = sm80_kernel<kIndex, Half, kGroups>;
  if (const cudaError_t error = allow_shared_memory<kKernel>(kBytes); error != cudaSuccess)
    return error;
  kKernel<<<params.partition.runs, kShape.threads(), kBytes, stream>>>(params);
  return cudaGetLastError();
}

// Kernels differ by the groups of scales in a stage, 0 meaning per column: that shapes the main loop.
template <size_t kIndex, typename Half>
cudaError_t launch_groups(const LaunchParams& params, int groups_per_stage, cudaStream_t stream) {
  switch (groups_per_stage) {
    case 0: return launch_instance<kIndex, Half, 0>(params, stream);
    case 1: return launch_instance<kIndex, Half, 1>(params, stream);
    case 2: return launch_instance<kIndex, Half, 2>(params, stream);
    default:
      if constexpr (kSm80Shapes[kIndex].shape.depth == 128)
        return launch_instance<kIndex, Half, 4>(params, stream);
      return cudaErrorInvalidValue;
  }
}

template <size_t kIndex>
cudaError_t launch_shape(const LaunchParams& params, Dtype activation, int groups_per_stage,
                         cudaStream_t stream) {
  return activation == Dtype::kF16
             ? launch_groups<kIndex, __half>(params, groups_per_stage, stream)
             : launch_groups<kIndex, __nv_bfloat16>(params, groups_per_stage, stream);
}

}  // namespace marlin
