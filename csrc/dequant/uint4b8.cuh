// Codes 0..15 that stand for code - 8, from packed words to the A fragment of the transposed weight.
//
// Nibbles 0 and 4 of a word are already 16 bits apart: masked, they are the low bits of two halves.
// With the exponent of 2^10 put in front (2^7 for bfloat16, whose mantissa is 7 bits), the half reads
// 1024 + code, and subtracting 1032 leaves code - 8, exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "ptx/mma.cuh"

namespace marlin {

template <typename Half>
struct Magic;

template <>
struct Magic<__half> {
  static constexpr uint32_t kExponent = 0x64006400;  // 1024, 1024
  static constexpr uint32_t kOffset = 0x64086408;    // 1032, 1032
};

template <>
struct Magic<__nv_bfloat16> {
  static constexpr uint32_t kExponent = 0x43004300;  // 128, 128
  static constexpr uint32_t kOffset = 0x43084308;    // 136, 136
};

__device__ inline __half2 subtract(__half2 a, __half2 b) { return __hsub2(a, b); }
__device__ inline __nv_bfloat162 subtract(__nv_bfloat162 a, __nv_bfloat162 b) {
  return __hsub2(a, b);
}

template <typename Half>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};

// Two codes, in bits 0..3 and 16..19 of `bits`, as a register of two halves code - 8.
template <typename Half>
__device__ inline uint32_t code_pair(uint32_t bits) {
  using Pair = typename PairOf<Half>::type;
  const uint32_t biased = (bits & 0x000f000fu) | Magic<Half>::kExponent;
  const uint32_t offset = Magic<Half>::kOffset;
  const Pair value =
      subtract(reinterpret_cast<const Pair&>(biased), reinterpret_cast<const Pair&>(offset));
  return reinterpret_cast<const uint32_t&>(value);
}

// The 16 columns x 16 rows of one block, in units of the scale.
template <typename Half>
__device__ inline ptx::FragmentA dequantize(uint32_t word) {
  return {{code_pair<Half>(word), code_pair<Half>(word >> 8), code_pair<Half>(word >> 4),
           code_pair<Half>(word >> 12)}};
}

}  // namespace marlin
