// Scales of groups that multiply weights, for warps that have no registers left to keep a group's
// product apart from their sums (kernel/sm80.cuh).
//
// Scaled weights are rounded to 16 bits once, as those of a dequantized weight are. FP16 overflows from
// (code - 8) · 8192 on. So a column that brings a scale of 8192 or more counts in sixteens from then
// on, and so do its sums.
#pragma once

#include "dequant/uint4b8.cuh"
#include "pipeline/scales.cuh"
#include "pipeline/sums.cuh"

namespace marlin {

// A lane's eight scales, each twice, as pairs of rows want them: [2 block + half].
struct PairedScales {
  uint32_t pairs[8];

  // Two neighbouring columns' scales at a time.
  __device__ void set(int i, uint32_t scales) {
    pairs[2 * i] = __byte_perm(scales, 0, 0x1010);
    pairs[2 * i + 1] = __byte_perm(scales, 0, 0x3232);
  }

  // A block's weights times their scales, rounded once.
  template <typename Pair>
  __device__ ptx::FragmentA times(ptx::FragmentA w, int block) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w.registers[i] =
          as_bits(__hmul2(as_pair<Pair>(w.registers[i]), as_pair<Pair>(pairs[2 * block + i % 2])));
    return w;
  }
};

template <typename Half>
class WeightScales;

template <>
class WeightScales<__half> {
 public:
  // The scales of the next rows of W. FP16 (nothing else fits: dispatch/select.cpp).
  template <int kBatches>
  __device__ void take(const Chunk& scales, Dtype, Sums<kBatches>& sums) {
    uint32_t any_large = 0;
#pragma unroll
    for (uint32_t two : scales.words) any_large |= large(two);
    if (__any_sync(~0u, any_large != 0)) count_in_sixteens(scales, sums);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scales_.set(
          i, as_bits(__hmul2(as_pair<__half2>(scales.words[i]), as_pair<__half2>(factors_[i]))));
  }

  __device__ ptx::FragmentA dequantized(uint32_t word, int block) const {
    return scales_.times<__half2>(dequantize<__half>(word), block);
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

  // The sign bits of those halves whose magnitude is 2^13 or more, infinite or not a number.
  static __device__ uint32_t large(uint32_t two) {
    return ((two & 0x70007000) + 0x10001000) & 0x80008000;
  }

  __device__ bool in_sixteens(int i) const {
    return (factors_[i / 2] >> (16 * (i % 2)) & 0xffff) == (kSixteenths & 0xffff);
  }

  template <int kBatches>
  __device__ void count_in_sixteens(const Chunk& scales, Sums<kBatches>& sums) {
    float ratios[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int shift = 16 * (i % 2);
      const bool changes = (large(scales.words[i / 2]) >> shift & 0x8000) && !in_sixteens(i);
      ratios[i] = changes ? 0.0625f : 1.0f;
      if (changes) factors_[i / 2] ^= (kOnes ^ kSixteenths) & 0xffffu << shift;
    }
    sums.multiply_columns(ratios);
  }

  PairedScales scales_;
  uint32_t factors_[4] = {kOnes, kOnes, kOnes, kOnes};  // what scales are multiplied by
};

// bfloat16 has the range; FP16's scales are rounded to it.
template <>
class WeightScales<__nv_bfloat16> {
 public:
  template <int kBatches>
  __device__ void take(const Chunk& scales, Dtype dtype, Sums<kBatches>&) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t two = scales.words[i];
      const auto converted = __float22bfloat162_rn(__half22float2(as_pair<__half2>(two)));
      scales_.set(i, dtype == Dtype::kF16 ? as_bits(converted) : two);
    }
  }

  __device__ ptx::FragmentA dequantized(uint32_t word, int block) const {
    return scales_.times<__nv_bfloat162>(dequantize<__nv_bfloat16>(word), block);
  }

  template <int kBatches>
  __device__ void settle(Sums<kBatches>&) const {}

 private:
  PairedScales scales_;
};

}  // namespace marlin
