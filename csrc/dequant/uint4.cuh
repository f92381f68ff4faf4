// Codes 0..15 that stand for code - zero, where every column of a group has a zero point of its own.
//
// A block's fragment is that of dequant/uint4b8.cuh with the difference taken off: code - 8, zero - 8
// and code - zero are small integers, exact in both types. Registers 0 and 2 of an A fragment hold the
// lane's first column, 1 and 3 the one eight to its right.
#pragma once

#include "dequant/uint4b8.cuh"
#include "format/weight_words.h"

namespace marlin {

template <typename Half>
struct PairOf;
template <>
struct PairOf<__half> {
  using type = __half2;
  static __device__ type both(int value) { return __half2half2(__int2half_rn(value)); }
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ type both(int value) { return __bfloat162bfloat162(__int2bfloat16_rn(value)); }
};

// The 16 columns x 16 rows of one block of a tile, in units of the scale; the zero points of the
// lane's two columns.
template <typename Half>
__device__ inline ptx::FragmentA dequantize(uint32_t word, int zero, int right_zero) {
  using Pair = typename PairOf<Half>::type;
  const Pair excess = PairOf<Half>::both(zero - kCodeZero);
  const Pair right_excess = PairOf<Half>::both(right_zero - kCodeZero);
  ptx::FragmentA w = dequantize<Half>(word);
  for (int i = 0; i < 4; ++i)
    w.registers[i] =
        as_bits(__hsub2(as_pair<Pair>(w.registers[i]), i % 2 == 0 ? excess : right_excess));
  return w;
}

}  // namespace marlin
