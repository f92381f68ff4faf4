// The net for problems that no kernel was tuned for: dequantize, then multiply in 16 bits.
#pragma once

#include "torch/checks.h"
#include "torch/cuda_scope.h"

namespace marlin::ops {

// A slice of columns at a time, so that it takes no more than 64 MB (or one strip) beside the result.
void multiply_dense(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                    void* y);

}  // namespace marlin::ops
