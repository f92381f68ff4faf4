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

template <size_t kIndex, typename Half, ScaleSteps kSteps>
cudaError_t launch_instance(const Sm80Params& params, cudaStream_t stream) {
  constexpr CtaShape kShape = kSm80Shapes[kIndex].shape;
  constexpr int kBytes = static_cast<int>(kSm80SharedBytes[kIndex]);
  constexpr auto kKernel = sm80_kernel<kIndex, Half, kSteps>;
  if (const cudaError_t error = allow_shared_memory<kKernel>(kBytes); error != cudaSuccess)
    return error;
  kKernel<<<params.partition.runs, kShape.threads(), kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <size_t kIndex, typename Half>
cudaError_t launch_steps(const Sm80Params& params, ScaleSteps steps, cudaStream_t stream) {
  switch (steps) {
    case ScaleSteps::kOnce: return launch_instance<kIndex, Half, ScaleSteps::kOnce>(params, stream);
    case ScaleSteps::kStage: return launch_instance<kIndex, Half, ScaleSteps::kStage>(params, stream);
    default: return launch_instance<kIndex, Half, ScaleSteps::kHalfStage>(params, stream);
  }
}

template <size_t kIndex>
cudaError_t launch_shape(const Sm80Params& params, Dtype activation, ScaleSteps steps,
                         cudaStream_t stream) {
  return activation == Dtype::kF16 ? launch_steps<kIndex, __half>(params, steps, stream)
                                   : launch_steps<kIndex, __nv_bfloat16>(params, steps, stream);
}

}  // namespace marlin
