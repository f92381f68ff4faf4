// Host side of one shape of the sm_90 engine; included by kernel/instances/ only.
#pragma once

#include "kernel/allow_shared_memory.cuh"
#include "kernel/sm90.cuh"
#include "kernel/sm90_launch.h"

namespace marlin {

template <size_t kIndex, typename Half, int kGroups>
cudaError_t launch_sm90_instance(const LaunchParams& params, const TensorMaps& maps, bool chained,
                                 cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(kSm90SharedBytes[kIndex]);
  constexpr auto kKernel = sm90_kernel<kIndex, Half, kGroups>;
  if (const cudaError_t error = allow_shared_memory<kKernel>(kBytes); error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = chained;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {2, 1, 1};
  constexpr int kTwins = kSm90Shapes[kIndex].shape.twins;
  cudaLaunchConfig_t config{};
  config.gridDim = params.partition.runs * kTwins;
  config.blockDim = kSm90Shapes[kIndex].shape.threads();
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = params.pairs || kTwins > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kKernel, params, maps);
}

template <size_t kIndex, typename Half>
cudaError_t launch_sm90_groups(const LaunchParams& params, const TensorMaps& maps, int groups,
                               bool chained, cudaStream_t stream) {
  switch (groups) {
    case 0: return launch_sm90_instance<kIndex, Half, 0>(params, maps, chained, stream);
    case 1: return launch_sm90_instance<kIndex, Half, 1>(params, maps, chained, stream);
    case 2: return launch_sm90_instance<kIndex, Half, 2>(params, maps, chained, stream);
    case 4: return launch_sm90_instance<kIndex, Half, 4>(params, maps, chained, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <size_t kIndex>
cudaError_t launch_sm90_shape(const LaunchParams& params, const TensorMaps& maps, Dtype activation,
                              int groups, bool chained, cudaStream_t stream) {
  return activation == Dtype::kF16
             ? launch_sm90_groups<kIndex, __half>(params, maps, groups, chained, stream)
             : launch_sm90_groups<kIndex, __nv_bfloat16>(params, maps, groups, chained, stream);
}

}  // namespace marlin
