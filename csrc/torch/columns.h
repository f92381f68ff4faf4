// The border of the quantizer's operators: their arguments checked, as core/columns.h wants them.
#pragma once

#include <optional>

#include "core/columns.h"
#include "torch/tensors.h"

namespace marlin::ops {

// work (rows ≤ 128, n), scale (n) and current (rows, n) contiguous; coupling (rows, rows) with rows of
// any pitch; all FP32 on one device. `codes` and `moved` are left for the caller to fill in.
ColumnsParams check_columns(const char* op, const Tensor& work, const Tensor& coupling,
                            const Tensor& scale, const std::optional<Tensor>& current);

// Likewise, with weights (rows) and scales (candidates, n).
TrialParams check_trials(const char* op, const Tensor& work, const Tensor& coupling,
                         const Tensor& weights, const Tensor& scales);

}  // namespace marlin::ops
