// Weights of a wgmma warp, shared -> registers: kCount blocks of 16 columns and their scales.
#pragma once

#include "dequant/uint4b8.cuh"
#include "format/scale_order.h"
#include "format/shared_memory.h"
#include "ptx/mma.cuh"

namespace marlin {

// kCount neighbouring words of a chunk, read at once.
template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t words[kCount];
};

// The scales of a lane's 2 kCount columns, each twice: what multiplies a pair of weights.
template <typename Half, int kCount>
struct PairScales {
  uint32_t pairs[2 * kCount];  // [2 block + half], as in ScaleFragment

  PairScales() = default;
  __device__ explicit PairScales(const uint32_t (&stored)[kCount]) {
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i)
      pairs[i] = __byte_perm(stored[i / 2], 0, i % 2 == 0 ? 0x1010 : 0x3232);
  }
};

__device__ inline uint32_t multiply_pair(__half, uint32_t a, uint32_t b) {
  return as_bits(__hmul2(as_pair<__half2>(a), as_pair<__half2>(b)));
}
__device__ inline uint32_t multiply_pair(__nv_bfloat16, uint32_t a, uint32_t b) {
  return as_bits(__hmul2(as_pair<__nv_bfloat162>(a), as_pair<__nv_bfloat162>(b)));
}

// A fragment's registers 0 and 2 are of the lane's column, 1 and 3 of the one 8 further.
template <typename Half, int kCount>
__device__ ptx::FragmentA dequantize_scaled(uint32_t word, const PairScales<Half, kCount>& scales,
                                            int block) {
  ptx::FragmentA w = dequantize<Half>(word);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w.registers[i] = multiply_pair(Half{}, w.registers[i], scales.pairs[2 * block + i % 2]);
  return w;
}

}  // namespace marlin
