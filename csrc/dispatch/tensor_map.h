// Descriptions of matrices for the copy engine (pipeline/tensor_maps.h says which). Built on the host
// without asking the device: about 0.1 us each.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/config.h"
#include "core/gemm.h"

namespace marlin {

cudaError_t describe_x(const GemmParams& gemm, Dtype type, const Sm90Shape& shape,
                       CUtensorMap& map);

// Remembered from call to call: they depend on where a weight lies and how it is cut, on nothing else.
// Per column `scales` is left as it is found.
cudaError_t describe_weight(const GemmParams& gemm, const Sm90Shape& shape, CUtensorMap& words,
                            CUtensorMap& scales);

}  // namespace marlin
