#include "torch/cuda_dense.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "dispatch/select.h"
#include "format/weight_words.h"
#include "kernel/launch.h"

namespace marlin::ops {
namespace {

// FP32 sums are made of so many rows of X at a time that they take at most so many bytes (or of one
// row); of whole tiles of cuBLAS where it has that many.
constexpr int64_t kSumBytes = int64_t{64} << 20;
constexpr int64_t kTileOfRows = 256;

// A slice of W and Y.
struct Columns {
  int64_t first;
  int64_t count;
};

void* at(const void* data, int64_t element, int element_bytes) {
  return static_cast<char*>(const_cast<void*>(data)) + element * element_bytes;
}

// Two dimensions at `data`, on like's device.
Tensor view(const void* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides,
            const Tensor& like, ScalarType type) {
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, like.device(), type);
}

// How many of m rows at a time: about equally many every time.
int64_t rows_at_a_time(int64_t m, int64_t row_bytes) {
  const int64_t most = std::max<int64_t>(1, kSumBytes / row_bytes);
  if (m <= most || most < kTileOfRows) return std::min(m, most);
  const int64_t tiles = (m + kTileOfRows - 1) / kTileOfRows, most_tiles = most / kTileOfRows;
  const int64_t times = (tiles + most_tiles - 1) / most_tiles;
  return (tiles + times - 1) / times * kTileOfRows;
}

// (k, columns) of W in 16 bits, or what rounding to them took off.
void dequantize(const char* op, const DeviceScope& scope, const MulCall& call, Columns columns,
                bool remainder, void* w) {
  const Problem& p = call.problem;
  const DequantizeParams part{call.words,
                              call.scales,
                              p.scale,
                              p.k,
                              p.n,
                              p.groups,
                              p.activation,
                              w,
                              call.zeros,
                              columns.first / kTileColumns,
                              columns.count / kTileColumns,
                              remainder};
  check_launch(op, launch_dequantize(part, scope.stream()));
}

// Y's columns = X · w + bias, which the library adds, if there is one of X's type, before it rounds.
void multiply(const Tensor& a, const MulCall& call, Columns columns, void* w, void* y) {
  const Problem& p = call.problem;
  const ScalarType type = a.scalar_type();
  const int element = size_bytes(p.activation);
  std::optional<Tensor> bias;
  if (call.bias != nullptr)
    bias = torch::stable::from_blob(at(call.bias, columns.first, element), {columns.count}, {1},
                                    a.device(), type);
  blas_linear(view(call.x, {p.m, p.k}, {call.x_pitch, 1}, a, type),
              view(w, {columns.count, p.k}, {1, columns.count}, a, type), bias,
              view(at(y, columns.first, element), {p.m, columns.count}, {p.n, 1}, a, type));
}

// Y's columns = X · (the terms of w) + bias, summed in FP32, some rows at a time, and rounded once.
void multiply_in_fp32(const char* op, const DeviceScope& scope, const Tensor& a,
                      const MulCall& call, Columns columns, void* w, int terms, int64_t rows,
                      void* sums, void* y) {
  const Problem& p = call.problem;
  const ScalarType type = a.scalar_type();
  const int element = size_bytes(p.activation);
  const void* bias = call.bias;
  if (bias != nullptr) bias = at(bias, columns.first, size_bytes(call.bias_dtype));
  for (int64_t first = 0; first < p.m; first += rows) {
    const int64_t count = std::min(rows, p.m - first);
    const Tensor x =
        view(at(call.x, first * call.x_pitch, element), {count, p.k}, {call.x_pitch, 1}, a, type);
    for (int term = 0; term < terms; ++term)
      blas_product(x,
                   view(at(w, term * p.k * columns.count, element), {p.k, columns.count},
                        {columns.count, 1}, a, type),
                   view(at(sums, term * count * columns.count, sizeof(float)),
                        {count, columns.count}, {columns.count, 1}, a, ScalarType::Float));
    const RoundSumsParams finish{static_cast<const float*>(sums),
                                 terms,
                                 count,
                                 columns.count,
                                 bias,
                                 call.bias_dtype,
                                 p.activation,
                                 at(y, first * p.n + columns.first, element),
                                 p.n};
    check_launch(op, launch_round_sums(finish, scope.stream()));
  }
}

}  // namespace

void multiply_dense(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                    const KernelConfig& config, void* y) {
  const Problem& p = call.problem;
  const int64_t widest = dense_slice_strips(p, config.runs) * kTileColumns;
  const int terms = call.zeros != nullptr ? 2 : 1;
  const bool other_bias = call.bias != nullptr && call.bias_dtype != p.activation;
  const Tensor w = empty_beside(a, {terms * p.k * widest}, a.scalar_type());
  int64_t rows = 0;
  std::optional<Tensor> sums;
  if (terms > 1 || other_bias) {
    rows = rows_at_a_time(p.m, terms * widest * static_cast<int64_t>(sizeof(float)));
    sums = empty_beside(a, {terms * rows * widest}, ScalarType::Float);
  }
  for (int64_t first = 0; first < p.n; first += widest) {
    const Columns columns{first, std::min(widest, p.n - first)};
    void* values = w.mutable_data_ptr();
    dequantize(op, scope, call, columns, false, values);
    if (terms > 1)
      dequantize(op, scope, call, columns, true,
                 at(values, p.k * columns.count, size_bytes(p.activation)));
    if (sums)
      multiply_in_fp32(op, scope, a, call, columns, values, terms, rows, sums->mutable_data_ptr(),
                       y);
    else multiply(a, call, columns, values, y);
  }
}

}  // namespace marlin::ops
