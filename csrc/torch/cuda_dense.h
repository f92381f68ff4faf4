// The net below the engines: dequantize, then multiply in 16 bits.
#pragma once

#include "core/config.h"
#include "torch/checks.h"
#include "torch/cuda_scope.h"

namespace marlin::ops {

// A slice of columns at a time, at most config.runs slices in all: memory for one of them is all it takes
// beside the result.
//
// With zero points W = hi + lo, rounded to 16 bits and what that left: a group's weights may have a mean
// then, and where activations have one, too, errors of hi alone would add up. So a slice is dequantized
// into both, and their products are added in FP32 before anything is rounded. FP32 sums, of one product,
// also take a bias of another type than X's. They are made of as many rows of X at a time as 64 MB hold.
void multiply_dense(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                    const KernelConfig& config, void* y);

}  // namespace marlin::ops
