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
cudaError_t describe_words(const GemmParams& gemm, const Sm90Shape& shape, CUtensorMap& map);
cudaError_t describe_scales(const GemmParams& gemm, const Sm90Shape& shape, CUtensorMap& map);

}  // namespace marlin
