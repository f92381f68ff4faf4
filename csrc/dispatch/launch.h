// From a configuration to a running kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "core/config.h"
#include "core/gemm.h"

namespace marlin {

// Bytes that `workspace.partials` of this launch must hold; 0 if no slice is shared.
int64_t partials_bytes(const Problem& problem, const KernelConfig& config);

// Launches the configuration's engine. `counters` are needed where a slice is shared. `chained`: the
// kernel may start while its predecessor drains, if the engine can.
cudaError_t launch_engine(const GemmParams& gemm, const Problem& problem,
                          const KernelConfig& config, const Workspace& workspace, bool chained,
                          cudaStream_t stream);

}  // namespace marlin
