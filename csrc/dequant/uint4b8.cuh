// Codes 0..15 that stand for code - 8, from packed words to the A fragment of the transposed weight.
//
// Nibbles 0 and 4 of a word are 16 bits apart: masked, they are the low bits of two halves. With
// FP16's exponent of 2^10 put in front, each half reads 1024 + code, and subtracting 1032 leaves
// code - 8, exactly. Nibbles 1 and 5, four bits higher, read 1024 + 16 code: one fused multiply-add
// with 1/16 and -72 does the same for them, and saves the shift. bfloat16, with its exponent of 2^7,
// has no room for the second form.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx/lop3.cuh"
#include "ptx/mma.cuh"

namespace marlin {

inline constexpr uint32_t kLowNibbles = 0x000f000f;
inline constexpr uint32_t kHighNibbles = 0x00f000f0;

template <typename Pair>
__device__ inline Pair as_pair(uint32_t bits) {
  return reinterpret_cast<const Pair&>(bits);
}

template <typename Pair>
__device__ inline uint32_t as_bits(Pair pair) {
  return reinterpret_cast<const uint32_t&>(pair);
}

// The 16 columns x 16 rows of one block of a tile, in units of the scale.
template <typename Half>
__device__ inline ptx::FragmentA dequantize(uint32_t word);

template <>
__device__ inline ptx::FragmentA dequantize<__half>(uint32_t word) {
  constexpr uint32_t kExponent = 0x64006400;                // 1024
  const auto offset = as_pair<__half2>(0x64086408);         // 1032
  const auto sixteenth = as_pair<__half2>(0x2c002c00);      // 1 / 16
  const auto scaled_offset = as_pair<__half2>(0xd480d480);  // -72
  const auto low = [&](uint32_t bits) {
    return as_bits(__hsub2(as_pair<__half2>(ptx::and_or<kLowNibbles, kExponent>(bits)), offset));
  };
  const auto high = [&](uint32_t bits) {
    return as_bits(__hfma2(as_pair<__half2>(ptx::and_or<kHighNibbles, kExponent>(bits)), sixteenth,
                           scaled_offset));
  };
  const uint32_t upper = word >> 8;
  return {{low(word), low(upper), high(word), high(upper)}};
}

template <>
__device__ inline ptx::FragmentA dequantize<__nv_bfloat16>(uint32_t word) {
  constexpr uint32_t kExponent = 0x43004300;                // 128
  const auto offset = as_pair<__nv_bfloat162>(0x43084308);  // 136
  const auto low = [&](uint32_t bits) {
    return as_bits(
        __hsub2(as_pair<__nv_bfloat162>(ptx::and_or<kLowNibbles, kExponent>(bits)), offset));
  };
  return {{low(word), low(word >> 8), low(word >> 4), low(word >> 12)}};
}

// Scales that dequantize_scaled takes: those of a lane's two columns in each of kCount blocks, every one
// twice, in a unit in which they are at least 2^-8 and below 1 (pipeline/prepare_scales.cuh puts them so).
//
// A nibble by itself, read as a half, is a subnormal number: code · 2^-24, or · 2^-20 four bits higher.
// The tensor cores' and the adders' FP16 is exact there and as fast as elsewhere, so one fused multiply-add
// makes it (code - 8) · scale · 2^-8, rounded once. The factor 2^-8 keeps scale · 2^16 finite.
inline constexpr int kFusedUnit = -8;    // log2
inline constexpr int kFusedStored = 12;  // scales come as scale · 2^12

template <int kCount>
struct FusedScales {
  uint32_t low[2 * kCount];  // [2 block + half]
  uint32_t high[2 * kCount];
  uint32_t offset[2 * kCount];

  FusedScales() = default;

  // `stored`: two neighbouring halves for each block.
  __device__ explicit FusedScales(const uint32_t (&stored)[kCount]) {
    const auto sixteen = as_pair<__half2>(0x4c004c00);
    const auto minus_2_to_minus_17 = as_pair<__half2>(0x80808080);
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      high[i] = __byte_perm(stored[i / 2], 0, i % 2 == 0 ? 0x1010 : 0x3232);
      low[i] = as_bits(__hmul2(as_pair<__half2>(high[i]), sixteen));
      offset[i] = as_bits(__hmul2(as_pair<__half2>(high[i]), minus_2_to_minus_17));
    }
  }
};

template <int kCount>
__device__ inline ptx::FragmentA dequantize_scaled(uint32_t word, const FusedScales<kCount>& scales,
                                                   int block) {
  const auto fuse = [&](uint32_t bits, uint32_t scale, int i) {
    return as_bits(__hfma2(as_pair<__half2>(bits), as_pair<__half2>(scale),
                           as_pair<__half2>(scales.offset[i])));
  };
  const uint32_t upper = word >> 8;
  const int left = 2 * block, right = 2 * block + 1;
  return {{fuse(word & kLowNibbles, scales.low[left], left),
           fuse(upper & kLowNibbles, scales.low[right], right),
           fuse(word & kHighNibbles, scales.high[left], left),
           fuse(upper & kHighNibbles, scales.high[right], right)}};
}

}  // namespace marlin
