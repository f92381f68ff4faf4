// The CPU backend's kernels, and the run-time choice of the instruction set they run on.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "core/columns.h"
#include "cpu/pack.h"

namespace marlin::cpu {

// Depth of the panel of W that is dequantized at once: 64 x 64 floats = 16 KB stay in L1.
inline constexpr int kPanelRows = 64;

struct Kernels {
  const char* name;
  int lanes;  // floats in a vector

  // W[first_row .. last_row, 64 strip .. 64 strip + 63] as FP32 into `panel`, whose rows lie `pitch`
  // floats apart. Rows are multiples of 16. (code - zero) * scale is exact in FP32.
  void (*dequantize)(const PackedWeight& weight, int64_t first_row, int64_t last_row, int64_t strip,
                     float* panel, int64_t pitch);

  // y[m, 64] (contiguous) = x[m, k] · W[:, strip], everything FP32; rows of x lie `x_pitch` floats
  // apart.
  void (*multiply_strip)(const PackedWeight& weight, int64_t strip, const float* x, int64_t x_pitch,
                         int64_t m, float* y);

  // The quantizer's loop, for outputs first … last - 1; first is a multiple of `lanes`, and so is
  // last unless it is n.
  void (*quantize_columns)(const ColumnsParams& params, int64_t first, int64_t last);
  void (*trial_losses)(const TrialParams& params, int64_t first, int64_t last);
};

// The kernels named `name`, or the fastest that this CPU runs for an empty name. nullptr if this CPU
// has no such kernels.
const Kernels* find_kernels(std::string_view name);

// What find_kernels finds here, fastest first.
std::span<const Kernels* const> available_kernels();

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace marlin::cpu
