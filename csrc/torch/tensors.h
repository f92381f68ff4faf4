// Small helpers on stable-ABI tensors: describing, converting and making them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <string>

#include "core/types.h"

namespace marlin::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws "marlin::mul: b: expected ..., got ...", a RuntimeError in Python.
[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected,
                       const std::string& got);

std::string device_name(const Tensor& tensor);  // "cuda:0"
std::string describe(const Tensor& tensor);     // "Half (16, 4096) on cuda:0"

ScalarType scalar_type(Dtype dtype);
bool is_cuda(const Tensor& tensor);

// An uninitialized contiguous tensor on like's device. Goes straight to the allocator: a trip
// through the dispatcher would cost each call half a microsecond.
Tensor empty_beside(const Tensor& like, std::span<const int64_t> sizes, ScalarType type);
Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type);

// out = x · wᵀ (+ bias, of the same type) by the library that Torch uses: aten::linear.
void blas_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                 const Tensor& out);

// out = x · w, (m, k) by (k, n) in 16 bits, on CUDA alone; out in FP32.
void blas_product(const Tensor& x, const Tensor& w, const Tensor& out);

}  // namespace marlin::ops
