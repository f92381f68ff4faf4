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

}  // namespace marlin
