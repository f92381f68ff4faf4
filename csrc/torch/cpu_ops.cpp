// The operators on the CPU: cpu/'s kernels on Torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu/backend.h"
#include "format/weight_words.h"
#include "torch/checks.h"

namespace marlin::ops {
namespace {

using torch::stable::parallel_for;

// Above this many rows, dequantizing column slices for the BLAS wins over our own inner loop: on a
// 2-core Sapphire Rapids, k = n = 4096, ours / MKL's GFLOP/s: 336 / 313 at m = 128, 309 / 399 at
// 512; with its dequantizing, MKL's way takes as long as ours near 384, and longer while others use
// the machine, since it waits for the slowest thread more often.
constexpr int64_t kMaxDirectRows = 256;

// Bytes of dequantized FP32 weight per slice. On that machine 16 MB (1024 columns) are too narrow for
// the BLAS, 7 % slower than all columns at m = 2048; with 32 MB there is no difference.
constexpr int64_t kSliceBytes = int64_t{32} << 20;

cpu::PackedWeight packed_weight(const MulCall& call) {
  const Problem& p = call.problem;
  return {call.words, call.scales, p.scale, p.k, p.n, p.groups, call.zeros};
}

// Rows of floats, converted from x where it is not FP32 already.
struct FloatRows {
  std::unique_ptr<float[]> converted;
  const float* data;
  int64_t pitch;
};

FloatRows float_rows(const MulCall& call) {
  const Problem& p = call.problem;
  if (p.activation == Dtype::kF32)
    return {nullptr, static_cast<const float*>(call.x), call.x_pitch};
  std::unique_ptr<float[]> rows(new float[p.m * p.k]);
  const auto* x = static_cast<const uint16_t*>(call.x);
  parallel_for(0, p.m, std::max<int64_t>(1, 65536 / p.k), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      cpu::load_floats(x + row * call.x_pitch, p.k, p.activation, rows.get() + row * p.k);
  });
  const float* data = rows.get();
  return {std::move(rows), data, p.k};
}

// Y, to which finished sums are written row by row.
class OutputRows {
 public:
  OutputRows(const MulCall& call, void* y) : problem_(call.problem), y_(static_cast<char*>(y)) {
    if (call.bias == nullptr) return;
    bias_.reset(new float[problem_.n]);
    cpu::load_floats(call.bias, problem_.n, call.bias_dtype, bias_.get());
  }

  // Y itself where it is FP32, so that sums can be made in place; else nullptr.
  float* floats() const {
    return problem_.activation == Dtype::kF32 ? reinterpret_cast<float*>(y_) : nullptr;
  }

  // Writes `width` sums (changed on the way) of one row, starting at `column`.
  void store(int64_t row, int64_t column, float* sums, int64_t width) const {
    if (bias_)
      for (int64_t i = 0; i < width; ++i) sums[i] += bias_[column + i];
    char* target = y_ + (row * problem_.n + column) * size_bytes(problem_.activation);
    if (target != reinterpret_cast<char*>(sums))
      cpu::store_floats(sums, width, problem_.activation, target);
  }

 private:
  Problem problem_;
  char* y_;
  std::unique_ptr<float[]> bias_;
};

void multiply_direct(const cpu::Kernels& kernels, const MulCall& call, const FloatRows& x,
                     const OutputRows& y) {
  const cpu::PackedWeight weight = packed_weight(call);
  const int64_t m = call.problem.m;
  parallel_for(0, weight.n / kTileColumns, 1, [&](int64_t first, int64_t last) {
    std::unique_ptr<float[]> sums(new float[m * kTileColumns]);
    for (int64_t strip = first; strip < last; ++strip) {
      kernels.multiply_strip(weight, strip, x.data, x.pitch, m, sums.get());
      for (int64_t row = 0; row < m; ++row)
        y.store(row, strip * kTileColumns, sums.get() + row * kTileColumns, kTileColumns);
    }
  });
}

Tensor float_view(const float* data, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides,
                  const Tensor& like) {
  return torch::stable::from_blob(const_cast<float*>(data), sizes, strides, like.device(),
                                  ScalarType::Float);
}

// W[:, first_strip .. first_strip + strips) as `dtype` to `target`, rows `pitch` elements apart. By way
// of a tile in L1, since a tile's rows at a pitch of whole pages fall into the same cache sets.
void dequantize_strips(const cpu::Kernels& kernels, const cpu::PackedWeight& weight,
                       int64_t first_strip, int64_t strips, Dtype dtype, void* target,
                       int64_t pitch) {
  parallel_for(0, weight.k / kTileRows, 1, [&](int64_t first, int64_t last) {
    float tile[kTileRows * kTileColumns];
    for (int64_t row = first * kTileRows; row < last * kTileRows; row += kTileRows) {
      for (int64_t strip = 0; strip < strips; ++strip) {
        kernels.dequantize(weight, row, row + kTileRows, first_strip + strip, tile, kTileColumns);
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t element = (row + r) * pitch + strip * kTileColumns;
          cpu::store_floats(tile + r * kTileColumns, kTileColumns, dtype,
                            static_cast<char*>(target) + element * size_bytes(dtype));
        }
      }
    }
  });
}

void multiply_by_slices(const cpu::Kernels& kernels, const Tensor& a, const MulCall& call,
                        const FloatRows& x, const OutputRows& y) {
  const cpu::PackedWeight weight = packed_weight(call);
  const int64_t m = call.problem.m, k = weight.k;
  const int64_t strips = weight.n / kTileColumns;
  const int64_t strip_bytes = k * kTileColumns * static_cast<int64_t>(sizeof(float));
  const int64_t slice_strips = std::clamp<int64_t>(kSliceBytes / strip_bytes, 1, strips);
  const int64_t width = slice_strips * kTileColumns;
  std::unique_ptr<float[]> w(new float[k * width]);
  std::unique_ptr<float[]> scratch(y.floats() ? nullptr : new float[m * width]);
  const Tensor x_tensor = float_view(x.data, {m, k}, {x.pitch, 1}, a);

  for (int64_t first = 0; first < strips; first += slice_strips) {
    const int64_t columns = std::min(slice_strips, strips - first) * kTileColumns;
    dequantize_strips(kernels, weight, first, columns / kTileColumns, Dtype::kF32, w.get(),
                      columns);
    const int64_t column = first * kTileColumns;
    float* sums = scratch ? scratch.get() : y.floats() + column;
    const int64_t pitch = scratch ? columns : weight.n;
    blas_linear(x_tensor, float_view(w.get(), {columns, k}, {1, columns}, a), std::nullopt,
                float_view(sums, {m, columns}, {pitch, 1}, a));
    if (!scratch && call.bias == nullptr) continue;
    parallel_for(0, m, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) y.store(row, column, sums + row * pitch, columns);
    });
  }
}

const cpu::Kernels& find_kernels(const char* op, const std::optional<std::string>& config) {
  if (const cpu::Kernels* found = cpu::find_kernels(config.value_or(""))) return *found;
  std::string names;
  for (const cpu::Kernels* kernels : cpu::available_kernels()) names += join(" ", kernels->name);
  fail(op, "config", "one that this CPU runs:" + names, "'" + *config + "'");
}

void multiply(const char* op, const Tensor& a, const MulCall& call,
              const std::optional<std::string>& config, void* y) {
  const cpu::Kernels& kernels = find_kernels(op, config);
  if (call.problem.m == 0) return;
  const FloatRows x = float_rows(call);
  const OutputRows rows(call, y);
  if (call.problem.m <= kMaxDirectRows) multiply_direct(kernels, call, x, rows);
  else multiply_by_slices(kernels, a, call, x, rows);
}

Tensor mul(const Tensor& a, const Tensor& b, const Tensor& s, std::optional<Tensor> bias,
           std::optional<std::string> config, std::optional<Tensor> zeros,
           std::optional<std::string> weight_type) {
  const MulCall call = check_mul("mul", a, b, s, bias, zeros, weight_type);
  Tensor y = new_output(a, call);
  multiply("mul", a, call, config, y.mutable_data_ptr());
  return y;
}

void mul_out(const Tensor& a, const Tensor& b, const Tensor& s, std::optional<Tensor> bias,
             std::optional<std::string> config, std::optional<Tensor> zeros,
             std::optional<std::string> weight_type, Tensor out) {
  const MulCall call = check_mul("mul.out", a, b, s, bias, zeros, weight_type);
  check_output("mul.out", a, call, out);
  multiply("mul.out", a, call, config, out.mutable_data_ptr());
}

Tensor pack(const Tensor& codes) {
  const Shape shape = check_codes("pack", codes);
  Tensor b = empty_beside(codes, {shape.k / kTileRows, 2 * shape.n}, ScalarType::Int);
  const auto* source = static_cast<const uint8_t*>(codes.const_data_ptr());
  auto* words = static_cast<uint32_t*>(b.mutable_data_ptr());
  std::atomic<uint8_t> seen{0};
  parallel_for(0, shape.k / kTileRows, 1, [&](int64_t first, int64_t last) {
    seen |= cpu::pack_tile_rows(source, shape.n, first, last, words);
  });
  if (seen > 15) fail("pack", "codes", "values 0..15", "a larger value");
  return b;
}

Tensor unpack(const Tensor& b) {
  const Shape shape = check_words("unpack", b);
  Tensor codes = empty_beside(b, {shape.k, shape.n}, ScalarType::Byte);
  const auto* words = static_cast<const uint32_t*>(b.const_data_ptr());
  auto* target = static_cast<uint8_t*>(codes.mutable_data_ptr());
  parallel_for(0, shape.k / kTileRows, 1, [&](int64_t first, int64_t last) {
    cpu::unpack_tile_rows(words, shape.n, first, last, target);
  });
  return codes;
}

template <typename Element>
void reorder_rows(const Tensor& scales, const Shape& shape, bool pack, Tensor& result) {
  const auto reorder = pack ? cpu::pack_scale_row<Element> : cpu::unpack_scale_row<Element>;
  const auto* source = static_cast<const Element*>(scales.const_data_ptr());
  auto* target = static_cast<Element*>(result.mutable_data_ptr());
  for (int64_t group = 0; group < shape.groups; ++group)
    reorder(source + group * shape.n, shape.n, shape.groups == 1, target + group * shape.n);
}

Tensor reorder_scales(const char* op, const char* argument, const Tensor& scales, bool pack) {
  const Shape shape = check_reordered(op, argument, scales);
  Tensor result = empty_beside(scales, {shape.groups, shape.n}, scales.scalar_type());
  if (scales.scalar_type() == ScalarType::Byte) reorder_rows<uint8_t>(scales, shape, pack, result);
  else reorder_rows<uint16_t>(scales, shape, pack, result);
  return result;
}

Tensor pack_scales(const Tensor& scales) {
  return reorder_scales("pack_scales", "scales", scales, true);
}

Tensor unpack_scales(const Tensor& s) { return reorder_scales("unpack_scales", "s", s, false); }

Tensor dequantize(const Tensor& b, const Tensor& s, std::optional<ScalarType> dtype,
                  std::optional<Tensor> zeros, std::optional<std::string> weight_type) {
  const Shape shape = check_weight("dequantize", b, s);
  const uint8_t* zero_points = check_zeros("dequantize", shape, s, zeros, weight_type);
  const Dtype type = check_value_type("dequantize", s, dtype);
  Tensor values = empty_beside(b, {shape.k, shape.n}, scalar_type(type));
  const cpu::PackedWeight weight{static_cast<const uint32_t*>(b.const_data_ptr()),
                                 s.const_data_ptr(),
                                 scale_dtype(s),
                                 shape.k,
                                 shape.n,
                                 shape.groups,
                                 zero_points};
  dequantize_strips(*cpu::find_kernels(""), weight, 0, shape.n / kTileColumns, type,
                    values.mutable_data_ptr(), shape.n);
  return values;
}

}  // namespace
}  // namespace marlin::ops

STABLE_TORCH_LIBRARY_IMPL(marlin, CPU, m) {
  using namespace marlin::ops;
  m.impl("mul", TORCH_BOX(&mul));
  m.impl("mul.out", TORCH_BOX(&mul_out));
  m.impl("mul_inference", TORCH_BOX(&mul));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("pack_scales", TORCH_BOX(&pack_scales));
  m.impl("unpack_scales", TORCH_BOX(&unpack_scales));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
