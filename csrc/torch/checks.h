// The border: every precondition of every operator is checked here, once, for all backends. A
// violated one fails with one line that names the operator and the argument, what was expected and
// what came.
#pragma once

#include <optional>

#include "torch/tensors.h"

namespace marlin::ops {

// A call of mul with every precondition met. Pointers borrow from the arguments, except that `x`
// points into `x_copy` when the rows of a could not be read in place.
struct MulCall {
  Problem problem;
  const void* x;
  int64_t x_pitch;  // elements between rows of x
  const uint32_t* words;
  const void* scales;
  const void* bias;  // n values or nullptr
  Dtype bias_dtype;
  const uint8_t* zeros;  // as problem.weight says
  std::optional<Tensor> x_copy;
};

// a (..., k) half, bfloat16 or, on the CPU, float32; b int32 (k / 16, 2 n); s (groups, n), bias (n),
// zeros uint8 (groups, n). Rows of a that are not 16-byte aligned are copied.
MulCall check_mul(const char* op, const Tensor& a, const Tensor& b, const Tensor& s,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& zeros,
                  const std::optional<std::string>& weight_type);

// A new tensor for Y: a's leading dimensions and n columns, of a's type; or `out` checked to be one.
Tensor new_output(const Tensor& a, const MulCall& call);
void check_output(const char* op, const Tensor& a, const MulCall& call, const Tensor& out);

struct Shape {
  int64_t k;
  int64_t n;
  int64_t groups;
};

Shape check_codes(const char* op, const Tensor& codes);                // uint8 (k, n)
Shape check_words(const char* op, const Tensor& b);                    // int32 (k / 16, 2 n)
Shape check_weight(const char* op, const Tensor& b, const Tensor& s);  // and s, matching

// Scales, or zero points (uint8), to reorder: (groups, n).
Shape check_reordered(const char* op, const char* argument, const Tensor& s);

Dtype scale_dtype(const Tensor& s);  // of scales that were checked

// The zero points of a weight of that shape, or nullptr if it has none; and that weight_type, where
// one is named, says the same.
const uint8_t* check_zeros(const char* op, const Shape& shape, const Tensor& s,
                           const std::optional<Tensor>& zeros,
                           const std::optional<std::string>& weight_type);

// The type that dequantize returns: `dtype`, or s's where none is given.
Dtype check_value_type(const char* op, const Tensor& s, std::optional<ScalarType> dtype);

}  // namespace marlin::ops
