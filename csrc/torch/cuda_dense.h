// The net below the engines: dequantize, then multiply in 16 bits.
#pragma once

#include "core/config.h"
#include "torch/checks.h"
#include "torch/cuda_scope.h"

namespace marlin::ops {

// A slice of columns at a time, at most config.runs slices in all: memory for one of them is all it takes
// beside the result.
void multiply_dense(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                    const KernelConfig& config, void* y);

}  // namespace marlin::ops
