// Scales of groups that multiply weights, for warps that have no registers left to keep a group's
// product apart from their sums (kernel/sm80.cuh).
//
// Scaled weights are rounded to 16 bits once, as those of a dequantized weight are. FP16 overflows from
// (code - 8) · 8192 on: where a column's scale is that large, its weights and sums count in sixteens,
// until its next scale that is not.
#pragma once

#include "dequant/uint4b8.cuh"
#include "pipeline/scales.cuh"
#include "pipeline/sums.cuh"

namespace marlin {

// One of a lane's eight scales twice, as a pair of rows wants it: half `i` of two neighbouring ones.
__device__ inline uint32_t both(uint32_t two, int i) {
  return __byte_perm(two, 0, i == 0 ? 0x1010 : 0x3232);
}

template <typename Half>
class WeightScales;

template <>
class WeightScales<__half> {
 public:
  // The scales of the next rows of W. FP16 (nothing else fits: can_run).
  template <int kBatches>
  __device__ void take(const Chunk& scales, Dtype, Sums<kBatches>& sums) {
    uint32_t changed = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) changed |= factors(scales.words[i]) ^ factors_[i];
    if (__any_sync(~0u, changed != 0)) change_units(scales, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two =
          as_bits(__hmul2(as_pair<__half2>(scales.words[i]), as_pair<__half2>(factors_[i])));
      pairs_[2 * i] = both(two, 0);
      pairs_[2 * i + 1] = both(two, 1);
    }
  }

  // A block's weights, rounded once.
  __device__ ptx::FragmentA dequantized(uint32_t word, int block) const {
    ptx::FragmentA w = dequantize<__half>(word);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w.registers[i] = as_bits(
          __hmul2(as_pair<__half2>(w.registers[i]), as_pair<__half2>(pairs_[2 * block + i % 2])));
    return w;
  }

  // The sums, in ones again.
  template <int kBatches>
  __device__ void settle(Sums<kBatches>& sums) const {
    float units[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) units[i] = in_sixteens(i) ? 16.0f : 1.0f;
    sums.multiply_columns(units);
  }

 private:
  static constexpr uint32_t kOnes = 0x3c003c00, kSixteenths = 0x2c002c00;

  // What two scales are multiplied by: one, or a sixteenth where the magnitude is 2^13 or more, infinite
  // or not a number.
  static __device__ uint32_t factors(uint32_t two) {
    const uint32_t large = ((two & 0x70007000) + 0x10001000) & 0x80008000;  // their sign bits
    return kOnes ^ (large >> 3);
  }
  static_assert((kOnes ^ kSixteenths) == 0x80008000 >> 3);

  __device__ bool in_sixteens(int i) const {
    return (factors_[i / 2] >> (16 * (i % 2)) & 0x1000) == 0;
  }

  template <int kBatches>
  __device__ void change_units(const Chunk& scales, Sums<kBatches>& sums) {
    float ratios[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) ratios[i] = in_sixteens(i) ? 16.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) factors_[i] = factors(scales.words[i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) ratios[i] *= in_sixteens(i) ? 0.0625f : 1.0f;
    sums.multiply_columns(ratios);
  }

  uint32_t pairs_[8];  // [2 block + half]
  uint32_t factors_[4] = {kOnes, kOnes, kOnes, kOnes};
};

// bfloat16 has the range, but not the digits of FP16's scales: these are split in two, what bfloat16
// holds and what that leaves.
template <>
class WeightScales<__nv_bfloat16> {
 public:
  template <int kBatches>
  __device__ void take(const Chunk& scales, Dtype dtype, Sums<kBatches>&) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t high = scales.words[i], low = 0;
      if (dtype == Dtype::kF16) {
        const float2 exact = __half22float2(as_pair<__half2>(scales.words[i]));
        const __nv_bfloat162 rounded = __float22bfloat162_rn(exact);
        const float2 held = __bfloat1622float2(rounded);
        high = as_bits(rounded);
        low = as_bits(
            __float22bfloat162_rn({remainder(exact.x, held.x), remainder(exact.y, held.y)}));
      }
      high_[2 * i] = both(high, 0);
      high_[2 * i + 1] = both(high, 1);
      low_[2 * i] = both(low, 0);
      low_[2 * i + 1] = both(low, 1);
    }
  }

  // A block's weights: (code - 8) · high + (code - 8) · low, the sum rounded once.
  __device__ ptx::FragmentA dequantized(uint32_t word, int block) const {
    ptx::FragmentA w = dequantize<__nv_bfloat16>(word);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto codes = as_pair<__nv_bfloat162>(w.registers[i]);
      const int column = 2 * block + i % 2;
      const auto small = __hmul2(codes, as_pair<__nv_bfloat162>(low_[column]));
      w.registers[i] = as_bits(__hfma2(codes, as_pair<__nv_bfloat162>(high_[column]), small));
    }
    return w;
  }

  template <int kBatches>
  __device__ void settle(Sums<kBatches>&) const {}

 private:
  // None of a scale that is not finite.
  static __device__ float remainder(float exact, float held) {
    return isfinite(exact) ? exact - held : 0.0f;
  }

  uint32_t high_[8];  // [2 block + half]
  uint32_t low_[8];
};

}  // namespace marlin
