// What the host knows of the sm_80 engine: a launch function per shape.
#pragma once

#include <cuda_runtime_api.h>

#include "core/config.h"
#include "core/gemm.h"

namespace marlin {

// kernel/instances/ defines these, one file each.
template <size_t kIndex>
cudaError_t launch_shape(const LaunchParams& params, Dtype activation, int groups_per_stage,
                         cudaStream_t stream);

}  // namespace marlin
