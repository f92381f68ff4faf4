// Host side of one shape of the sm_80 engine; included by kernel/instances/ only.
#pragma once

#include <atomic>

#include "kernel/sm80.cuh"
#include "kernel/sm80_launch.h"

namespace marlin {

// Shared memory beyond 48 KB must be asked for, once per kernel and device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // bit per device
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

template <size_t kIndex, typename Half, int kGroups>
cudaError_t launch_instance(const Sm80Params& params, cudaStream_t stream) {
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
cudaError_t launch_groups(const Sm80Params& params, int groups_per_stage, cudaStream_t stream) {
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
cudaError_t launch_shape(const Sm80Params& params, Dtype activation, int groups_per_stage,
                         cudaStream_t stream) {
  return activation == Dtype::kF16
             ? launch_groups<kIndex, __half>(params, groups_per_stage, stream)
             : launch_groups<kIndex, __nv_bfloat16>(params, groups_per_stage, stream);
}

}  // namespace marlin
