#include "torch/cuda_dense.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "format/weight_words.h"
#include "kernel/launch.h"

namespace marlin::ops {
namespace {

constexpr int64_t kSliceBytes = int64_t{64} << 20;

Tensor half_view(const void* data, int64_t rows, int64_t columns, int64_t pitch,
                 const Tensor& like) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {pitch, 1},
                                  like.device(), like.scalar_type());
}

}  // namespace

void multiply_dense(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                    void* y) {
  const Problem& p = call.problem;
  const int64_t strips = p.n / kTileColumns;
  const int64_t strip_bytes = p.k * kTileColumns * size_bytes(p.activation);
  const int64_t slice_strips = std::clamp<int64_t>(kSliceBytes / strip_bytes, 1, strips);
  const Tensor w = empty_beside(a, {p.k * slice_strips * kTileColumns}, a.scalar_type());
  const Tensor x = half_view(call.x, p.m, p.k, call.x_pitch, a);
  for (int64_t first = 0; first < strips; first += slice_strips) {
    const int64_t count = std::min(slice_strips, strips - first);
    const int64_t columns = count * kTileColumns, column = first * kTileColumns;
    const DequantizeParams part{call.words, call.scales, p.scale,      p.k,
                                p.n,        p.groups,    p.activation, w.mutable_data_ptr(),
                                call.zeros, first,       count};
    check_launch(op, launch_dequantize(part, scope.stream()));
    auto* target = static_cast<char*>(y) + column * size_bytes(p.activation);
    blas_multiply(x, half_view(w.const_data_ptr(), p.k, columns, columns, a),
                  half_view(target, p.m, columns, p.n, a));
  }
  if (call.bias != nullptr)
    check_launch(
        op, launch_add_bias(call.bias, call.bias_dtype, p.m, p.n, p.activation, y, scope.stream()));
}

}  // namespace marlin::ops
