#include "torch/cuda_dense.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "dispatch/select.h"
#include "format/weight_words.h"
#include "kernel/launch.h"

namespace marlin::ops {
namespace {

// Two dimensions at `data`, of like's type and device.
Tensor view(const void* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides,
            const Tensor& like) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, like.device(),
                                  like.scalar_type());
}

}  // namespace

void multiply_dense(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                    const KernelConfig& config, void* y) {
  const Problem& p = call.problem;
  const int64_t element = size_bytes(p.activation);
  const int64_t strips = p.n / kTileColumns, slice_strips = dense_slice_strips(p, config.runs);
  const Tensor w = empty_beside(a, {p.k * slice_strips * kTileColumns}, a.scalar_type());
  const Tensor x = view(call.x, {p.m, p.k}, {call.x_pitch, 1}, a);
  // The library adds a bias of the activations' type before it rounds; others are added afterwards.
  const bool adds_bias = call.bias != nullptr && call.bias_dtype == p.activation;
  for (int64_t first = 0; first < strips; first += slice_strips) {
    const int64_t count = std::min(slice_strips, strips - first);
    const int64_t columns = count * kTileColumns, column = first * kTileColumns;
    const DequantizeParams part{call.words, call.scales, p.scale,      p.k,
                                p.n,        p.groups,    p.activation, w.mutable_data_ptr(),
                                call.zeros, first,       count};
    check_launch(op, launch_dequantize(part, scope.stream()));
    std::optional<Tensor> bias;
    if (adds_bias)
      bias = torch::stable::from_blob(
          const_cast<char*>(static_cast<const char*>(call.bias) + column * element), {columns}, {1},
          a.device(), a.scalar_type());
    blas_linear(x, view(w.const_data_ptr(), {columns, p.k}, {1, columns}, a), bias,
                view(static_cast<char*>(y) + column * element, {p.m, columns}, {p.n, 1}, a));
  }
  if (call.bias != nullptr && !adds_bias)
    check_launch(
        op, launch_add_bias(call.bias, call.bias_dtype, p.m, p.n, p.activation, y, scope.stream()));
}

}  // namespace marlin::ops
