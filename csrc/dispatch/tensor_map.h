// Descriptions of matrices for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "core/gemm.h"

namespace marlin {

// X (m, k) in boxes of `rows` rows by 64 columns, swizzled (format/swizzle.h), zero outside. Built on
// the host without asking the device: about 0.1 us.
cudaError_t describe_activations(const GemmParams& gemm, Dtype type, int rows, CUtensorMap& map);

}  // namespace marlin
