// The quantizer's operators on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cpu/backend.h"
#include "torch/columns.h"

namespace marlin::ops {
namespace {

// Calls `run(kernels, first, last)` for ranges of outputs whose starts are whole vectors.
template <typename Run>
void over_outputs(int64_t n, int64_t grain_vectors, const Run& run) {
  const cpu::Kernels& kernels = *cpu::find_kernels("");
  const int64_t vectors = (n + kernels.lanes - 1) / kernels.lanes;
  torch::stable::parallel_for(0, vectors, grain_vectors, [&](int64_t first, int64_t last) {
    run(kernels, first * kernels.lanes, std::min(n, last * kernels.lanes));
  });
}

std::tuple<Tensor, Tensor> quantize_columns(const Tensor& work, const Tensor& coupling,
                                            const Tensor& scale, std::optional<Tensor> current) {
  ColumnsParams params = check_columns("quantize_columns", work, coupling, scale, current);
  const ColumnSegment& segment = params.segment;
  Tensor codes = empty_beside(work, {segment.rows, segment.n}, ScalarType::Float);
  Tensor moved = empty_beside(work, {segment.rows, segment.n}, ScalarType::Float);
  params.codes = static_cast<float*>(codes.mutable_data_ptr());
  params.moved = static_cast<float*>(moved.mutable_data_ptr());
  over_outputs(segment.n, 16, [&](const cpu::Kernels& kernels, int64_t first, int64_t last) {
    kernels.quantize_columns(params, first, last);
  });
  return {codes, moved};
}

Tensor trial_losses(const Tensor& work, const Tensor& coupling, const Tensor& weights,
                    const Tensor& scales) {
  TrialParams params = check_trials("trial_losses", work, coupling, weights, scales);
  Tensor losses = empty_beside(work, {params.candidates, params.segment.n}, ScalarType::Float);
  params.losses = static_cast<float*>(losses.mutable_data_ptr());
  over_outputs(params.segment.n, 1, [&](const cpu::Kernels& kernels, int64_t first, int64_t last) {
    kernels.trial_losses(params, first, last);
  });
  return losses;
}

}  // namespace
}  // namespace marlin::ops

STABLE_TORCH_LIBRARY_IMPL(marlin, CPU, m) {
  m.impl("quantize_columns", TORCH_BOX(&marlin::ops::quantize_columns));
  m.impl("trial_losses", TORCH_BOX(&marlin::ops::trial_losses));
}
