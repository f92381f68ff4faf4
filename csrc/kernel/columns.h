// The quantizer's column loop on the device; see core/columns.h.
#pragma once

#include <cuda_runtime_api.h>

#include "core/columns.h"

namespace marlin {

cudaError_t launch_quantize_columns(const ColumnsParams& params, cudaStream_t stream);
cudaError_t launch_trial_losses(const TrialParams& params, cudaStream_t stream);

}  // namespace marlin
