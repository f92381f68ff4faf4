// The quantizer's operators on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernel/columns.h"
#include "torch/columns.h"
#include "torch/cuda_scope.h"

namespace marlin::ops {
namespace {

std::tuple<Tensor, Tensor> quantize_columns(const Tensor& work, const Tensor& coupling,
                                            const Tensor& scale, std::optional<Tensor> current) {
  const DeviceScope scope(work);
  ColumnsParams params = check_columns("quantize_columns", work, coupling, scale, current);
  const ColumnSegment& segment = params.segment;
  Tensor codes = empty_beside(work, {segment.rows, segment.n}, ScalarType::Float);
  Tensor moved = empty_beside(work, {segment.rows, segment.n}, ScalarType::Float);
  params.codes = static_cast<float*>(codes.mutable_data_ptr());
  params.moved = static_cast<float*>(moved.mutable_data_ptr());
  check_launch("quantize_columns", launch_quantize_columns(params, scope.stream()));
  return {codes, moved};
}

Tensor trial_losses(const Tensor& work, const Tensor& coupling, const Tensor& weights,
                    const Tensor& scales) {
  const DeviceScope scope(work);
  TrialParams params = check_trials("trial_losses", work, coupling, weights, scales);
  Tensor losses = empty_beside(work, {params.candidates, params.segment.n}, ScalarType::Float);
  params.losses = static_cast<float*>(losses.mutable_data_ptr());
  check_launch("trial_losses", launch_trial_losses(params, scope.stream()));
  return losses;
}

}  // namespace
}  // namespace marlin::ops

STABLE_TORCH_LIBRARY_IMPL(marlin, CUDA, m) {
  m.impl("quantize_columns", TORCH_BOX(&marlin::ops::quantize_columns));
  m.impl("trial_losses", TORCH_BOX(&marlin::ops::trial_losses));
}
