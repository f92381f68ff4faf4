// What the host knows of the sm_90 engine: a launch function per shape.
#pragma once

#include <cuda_runtime_api.h>

#include "core/config.h"
#include "core/gemm.h"
#include "pipeline/tensor_maps.h"

namespace marlin {

// Whether this build has machine code for 9.0a; without, it lacks the instances, too.
#ifdef MARLIN_SM90
inline constexpr bool kBuiltForSm90 = true;
#else
inline constexpr bool kBuiltForSm90 = false;
#endif

// kernel/instances/ defines these, one file each. `groups` of scales in 128 rows of W; 0: per column.
// `chained`: it may start while its predecessor drains (programmatic dependent launch).
template <size_t kIndex>
cudaError_t launch_sm90_shape(const LaunchParams& params, const TensorMaps& maps, Dtype activation,
                              int groups, bool chained, cudaStream_t stream);

}  // namespace marlin
