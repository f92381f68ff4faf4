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
  std::optional<Tensor> x_copy;
};

// a (..., k) half, bfloat16 or, on the CPU, float32; b int32 (k / 16, 2 n); s (groups, n) and bias
// (n). Rows of a that are not 16-byte aligned are copied.
MulCall check_mul(const char* op, const Tensor& a, const Tensor& b, const Tensor& s,
                  const std::optional<Tensor>& bias);

// A new tensor for Y: a's leading dimensions and n columns, of a's type; or `out` checked to be one.
Tensor new_output(const Tensor& a, const MulCall& call);
void check_output(const char* op, const Tensor& a, const MulCall& call, const Tensor& out);

struct Shape {
  int64_t k;
  int64_t n;
  int64_t groups;
};

Shape check_codes(const char* op, const Tensor& codes);                     // uint8 (k, n)
Shape check_words(const char* op, const Tensor& b);                         // int32 (k / 16, 2 n)
Shape check_scales(const char* op, const char* argument, const Tensor& s);  // half (groups, n)
Shape check_weight(const char* op, const Tensor& b, const Tensor& s);       // both, matching

Dtype scale_dtype(const Tensor& s);  // of scales that were checked

// The type that dequantize returns: `dtype`, or s's where none is given.
Dtype check_value_type(const char* op, const Tensor& s, std::optional<ScalarType> dtype);

}  // namespace marlin::ops
