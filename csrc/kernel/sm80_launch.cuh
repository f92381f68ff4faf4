// Host side of one shape of the sm_80 engine; included by kernel/instances/ only.
#pragma once

#include "kernel/allow_shared_memory.cuh"
#include "kernel/sm80.cuh"
#include "kernel/sm80_launch.h"

namespace marlin {

// Weights are the first to leave L2, for launches that read them once: what they would displace, X and
// partial sums, is needed again. (For a whole launch, since a cp.async with a cache policy of its own
// becomes an illegal instruction with nvcc 13.0. On an H200 up to 4 % of small layers at m = 1 and 16,
// bench/LOG.md.) Adds to `config`, which points to `attribute`.
inline cudaError_t stream_weights(const GemmParams& gemm, cudaLaunchConfig_t& config,
                                  cudaLaunchAttribute& attribute) {
  int device = 0, most_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxAccessPolicyWindowSize, device);
  if (error != cudaSuccess || most_bytes == 0) return error;
  const int64_t bytes = gemm.k * gemm.n / 2;
  attribute.id = cudaLaunchAttributeAccessPolicyWindow;
  cudaAccessPolicyWindow& window = attribute.val.accessPolicyWindow;
  window.base_ptr = const_cast<uint32_t*>(gemm.words);
  window.num_bytes = static_cast<size_t>(bytes < most_bytes ? bytes : most_bytes);
  window.hitRatio = 1;
  window.hitProp = cudaAccessPropertyStreaming;
  window.missProp = cudaAccessPropertyStreaming;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaSuccess;
}

template <size_t kIndex, typename Half, int kGroups>
cudaError_t launch_instance(const LaunchParams& params, cudaStream_t stream) {
  constexpr CtaShape kShape = kSm80Shapes[kIndex].shape;
  constexpr int kBytes = static_cast<int>(kSm80SharedBytes[kIndex]);
  constexpr auto kKernel = sm80_kernel<kIndex, Half, kGroups>;
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  cudaError_t error = allow_shared_memory<kKernel>(kBytes);
  const bool reads_weights_once = params.gemm.m <= kShape.rows;
  if (error == cudaSuccess && reads_weights_once)
    error = stream_weights(params.gemm, config, attribute);
  if (error != cudaSuccess) return error;
  config.gridDim = params.partition.runs;
  config.blockDim = kShape.threads();
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kKernel, params);
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
