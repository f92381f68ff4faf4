#include "torch/checks.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "format/weight_words.h"

namespace marlin::ops {
namespace {

std::optional<Dtype> float_type(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return Dtype::kF16;
    case ScalarType::BFloat16: return Dtype::kBF16;
    case ScalarType::Float: return Dtype::kF32;
    default: return std::nullopt;
  }
}

std::optional<Dtype> float_type(const Tensor& tensor) { return float_type(tensor.scalar_type()); }

void expect_dim(const char* op, const char* argument, const Tensor& tensor, int64_t dim,
                const char* meaning) {
  if (tensor.dim() != dim)
    fail(op, argument, join("a ", dim, "-d tensor ", meaning), describe(tensor));
}

void expect_type(const char* op, const char* argument, const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() != type)
    fail(op, argument, torch::headeronly::toString(type), describe(tensor));
}

void expect_same_device(const char* op, const char* argument, const Tensor& tensor,
                        const char* other_argument, const Tensor& other) {
  if (tensor.device() != other.device())
    fail(op, argument, join("a tensor on ", device_name(other), " like ", other_argument),
         describe(tensor));
}

uintptr_t misalignment(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16; }

// Contiguous and, on CUDA, aligned for 16-byte loads.
void expect_plain(const char* op, const char* argument, const Tensor& tensor) {
  if (!tensor.is_contiguous())
    fail(op, argument, "a contiguous tensor", join("a strided ", describe(tensor)));
  if (const auto past = misalignment(tensor.const_data_ptr()); past != 0 && is_cuda(tensor))
    fail(op, argument, "16-byte aligned data",
         join("an address ", past, " bytes past a multiple of 16, of ", describe(tensor)));
}

// The distance between rows, if all leading dimensions of a collapse into one with one stride.
std::optional<int64_t> row_pitch(const Tensor& a) {
  const int64_t last = a.dim() - 1, k = a.size(last);
  if (k > 1 && a.stride(last) != 1) return std::nullopt;
  std::optional<int64_t> pitch;
  int64_t wanted = 0;
  for (int64_t i = last - 1; i >= 0; --i) {
    if (a.size(i) == 1) continue;
    if (pitch && a.stride(i) != wanted) return std::nullopt;
    if (!pitch) pitch = a.stride(i);
    wanted = a.stride(i) * a.size(i);
  }
  return pitch.value_or(k);
}

std::vector<int64_t> output_sizes(const Tensor& a, int64_t n) {
  std::vector<int64_t> sizes(a.dim(), n);
  for (int64_t i = 0; i + 1 < a.dim(); ++i) sizes[i] = a.size(i);
  return sizes;
}

int64_t row_count(const Tensor& a) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) rows *= a.size(i);
  return rows;
}

void read_in_place_or_copy(const Tensor& a, MulCall& call) {
  const auto pitch = row_pitch(a);
  const int64_t m = call.problem.m, k = call.problem.k;
  call.x = a.const_data_ptr();
  call.x_pitch = pitch.value_or(k);
  const int64_t pitch_bytes = call.x_pitch * size_bytes(call.problem.activation);
  const bool aligned = misalignment(call.x) == 0 && (m <= 1 || pitch_bytes % 16 == 0);
  const bool overlap = m > 1 && call.x_pitch < k;  // as expand() makes: no tensor map can say so
  if (m == 0 || (pitch && aligned && !overlap)) return;
  call.x_copy = empty_beside(a, {m, k}, a.scalar_type());
  torch::stable::copy_(*call.x_copy, torch::stable::reshape(a, std::array<int64_t, 2>{m, k}));
  call.x = call.x_copy->const_data_ptr();
  call.x_pitch = k;
}

bool is_scale(const Tensor& s) {
  const auto type = float_type(s);
  return type && *type != Dtype::kF32;
}

Shape group_shape(const char* op, const char* argument, const Tensor& s) {
  expect_dim(op, argument, s, 2, "(groups, n)");
  expect_plain(op, argument, s);
  if (s.size(0) == 0 || s.size(1) == 0 || s.size(1) % kTileColumns != 0)
    fail(op, argument, "(groups, n) with n a multiple of 64", describe(s));
  return {0, s.size(1), s.size(0)};
}

Shape check_scales(const char* op, const char* argument, const Tensor& s) {
  if (!is_scale(s)) fail(op, argument, "Half or BFloat16", describe(s));
  return group_shape(op, argument, s);
}

}  // namespace

Shape check_codes(const char* op, const Tensor& codes) {
  expect_type(op, "codes", codes, ScalarType::Byte);
  expect_dim(op, "codes", codes, 2, "(k, n)");
  expect_plain(op, "codes", codes);
  const int64_t k = codes.size(0), n = codes.size(1);
  if (k == 0 || k % kTileRows != 0 || n == 0 || n % kTileColumns != 0)
    fail(op, "codes", "(k, n) with k a multiple of 16 and n of 64", describe(codes));
  return {k, n, 1};
}

Shape check_words(const char* op, const Tensor& b) {
  expect_type(op, "b", b, ScalarType::Int);
  expect_dim(op, "b", b, 2, "(k / 16, 2 n)");
  expect_plain(op, "b", b);
  if (b.size(0) == 0 || b.size(1) == 0 || b.size(1) % kTileWords != 0)
    fail(op, "b", "(k / 16, 2 n) with n a multiple of 64", describe(b));
  return {b.size(0) * kTileRows, b.size(1) / 2, 1};
}

Shape check_reordered(const char* op, const char* argument, const Tensor& s) {
  if (s.scalar_type() != ScalarType::Byte && !is_scale(s))
    fail(op, argument, "Half, BFloat16 or, for zero points, Byte", describe(s));
  return group_shape(op, argument, s);
}

Shape check_weight(const char* op, const Tensor& b, const Tensor& s) {
  Shape shape = check_words(op, b);
  expect_same_device(op, "s", s, "b", b);
  const Shape scales = check_scales(op, "s", s);
  if (scales.n != shape.n)
    fail(op, "s", join("(groups, n) with n = ", shape.n, " like b"), describe(s));
  shape.groups = scales.groups;
  const int64_t rows = shape.k / shape.groups;
  const bool known = shape.groups == 1 || rows == 32 || rows == 64 || rows == 128;
  if (!known || shape.k % shape.groups != 0)
    fail(op, "s", join("one group, or groups of 32, 64 or 128 rows that divide k = ", shape.k),
         join(shape.groups, " groups: ", describe(s)));
  return shape;
}

Dtype scale_dtype(const Tensor& s) { return float_type(s).value(); }

const uint8_t* check_zeros(const char* op, const Shape& shape, const Tensor& s,
                           const std::optional<Tensor>& zeros,
                           const std::optional<std::string>& weight_type) {
  const WeightType type = zeros ? WeightType::kUint4 : WeightType::kUint4b8;
  if (weight_type && *weight_type != name(type))
    fail(op, "weight_type",
         join("nothing or '", name(type), "', the type ", zeros ? "with" : "without", " zeros"),
         join("'", *weight_type, "'"));
  if (!zeros) return nullptr;
  expect_type(op, "zeros", *zeros, ScalarType::Byte);
  expect_same_device(op, "zeros", *zeros, "s", s);
  expect_dim(op, "zeros", *zeros, 2, "(groups, n)");
  if (zeros->size(0) != shape.groups || zeros->size(1) != shape.n)
    fail(op, "zeros", join("(", shape.groups, ", ", shape.n, ") like s"), describe(*zeros));
  expect_plain(op, "zeros", *zeros);
  return static_cast<const uint8_t*>(zeros->const_data_ptr());
}

Dtype check_value_type(const char* op, const Tensor& s, std::optional<ScalarType> dtype) {
  const auto type = float_type(dtype.value_or(s.scalar_type()));
  if (!type) fail(op, "dtype", "Half, BFloat16 or Float", torch::headeronly::toString(*dtype));
  return *type;
}

// The kernels count rows, columns and inputs in 32 bits, and the sm_80 engine also the chunks of 16
// bytes between the first of X, or of the words, and any other.
constexpr int64_t kMostCudaSide = int64_t{1} << 30;
constexpr int64_t kMostCudaBytes = int64_t{16} << 32;

void check_cuda_bytes(const char* op, const char* argument, int64_t bytes, const char* which) {
  if (bytes > kMostCudaBytes)
    fail(op, argument, join("at most ", kMostCudaBytes, " bytes", which, " on CUDA"),
         join(bytes, " bytes"));
}

// Before X is copied, if it has to be.
void check_cuda_sizes(const char* op, const Problem& p) {
  if (p.m > kMostCudaSide || p.n > kMostCudaSide || p.k > kMostCudaSide)
    fail(op, "a", join("at most ", kMostCudaSide, " rows, inputs and outputs on CUDA"),
         join("(", p.m, ", ", p.k, ") times (", p.k, ", ", p.n, ")"));
  check_cuda_bytes(op, "a", p.m * p.k * size_bytes(p.activation), "");
  check_cuda_bytes(op, "b", p.k * p.n / 2, "");
}

void check_cuda_reach(const char* op, const MulCall& call) {
  const Problem& p = call.problem;
  const int64_t bytes = p.m > 0 ? ((p.m - 1) * call.x_pitch + p.k) * size_bytes(p.activation) : 0;
  check_cuda_bytes(op, "a", bytes, " from its first row to its last");
}

MulCall check_mul(const char* op, const Tensor& a, const Tensor& b, const Tensor& s,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& zeros,
                  const std::optional<std::string>& weight_type) {
  const auto activation = float_type(a);
  if (!activation || (*activation == Dtype::kF32 && is_cuda(a)))
    fail(op, "a", is_cuda(a) ? "Half or BFloat16" : "Half, BFloat16 or Float", describe(a));
  expect_same_device(op, "b", b, "a", a);
  const Shape weight = check_weight(op, b, s);
  if (a.dim() == 0 || a.size(a.dim() - 1) != weight.k)
    fail(op, "a", join("(..., k) with k = ", weight.k, " like b"), describe(a));

  MulCall call{};
  call.problem = {row_count(a), weight.n, weight.k, weight.groups, *activation, scale_dtype(s)};
  call.words = static_cast<const uint32_t*>(b.const_data_ptr());
  call.scales = s.const_data_ptr();
  call.zeros = check_zeros(op, weight, s, zeros, weight_type);
  call.problem.weight = call.zeros ? WeightType::kUint4 : WeightType::kUint4b8;
  if (bias) {
    const auto type = float_type(*bias);
    if (!type) fail(op, "bias", "Half, BFloat16 or Float", describe(*bias));
    expect_same_device(op, "bias", *bias, "a", a);
    if (bias->dim() != 1 || bias->size(0) != weight.n || !bias->is_contiguous())
      fail(op, "bias", join("a contiguous (n,) with n = ", weight.n), describe(*bias));
    call.bias = bias->const_data_ptr();
    call.bias_dtype = *type;
  }
  if (is_cuda(a)) check_cuda_sizes(op, call.problem);
  read_in_place_or_copy(a, call);
  if (is_cuda(a)) check_cuda_reach(op, call);
  return call;
}

Tensor new_output(const Tensor& a, const MulCall& call) {
  return empty_beside(a, output_sizes(a, call.problem.n), a.scalar_type());
}

void check_output(const char* op, const Tensor& a, const MulCall& call, const Tensor& out) {
  expect_type(op, "out", out, a.scalar_type());
  expect_same_device(op, "out", out, "a", a);
  const auto sizes = output_sizes(a, call.problem.n);
  bool same = out.dim() == a.dim();
  for (int64_t i = 0; same && i < out.dim(); ++i) same = out.size(i) == sizes[i];
  if (!same)
    fail(op, "out", join("a's leading dimensions and n = ", call.problem.n, " columns"),
         describe(out));
  expect_plain(op, "out", out);

  // Y is written while X is still read.
  const Problem& p = call.problem;
  const auto* x = static_cast<const char*>(call.x);
  const auto* y = static_cast<const char*>(out.const_data_ptr());
  const int64_t element = size_bytes(p.activation);
  const int64_t x_bytes = p.m > 0 ? ((p.m - 1) * call.x_pitch + p.k) * element : 0;
  if (x < y + p.m * p.n * element && y < x + x_bytes)
    fail(op, "out", "memory that a does not use", "an overlap with a");
}

}  // namespace marlin::ops
