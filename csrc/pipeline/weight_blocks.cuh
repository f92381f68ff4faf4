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
  __device__ explicit PairScales(const Words<kCount>& words) {
#pragma unroll
    for (int block = 0; block < kCount; ++block) {
      pairs[2 * block] = __byte_perm(words.words[block], 0, 0x1010);
      pairs[2 * block + 1] = __byte_perm(words.words[block], 0, 0x3232);
    }
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
__device__ void scale_weights(ptx::FragmentA& w, const PairScales<Half, kCount>& scales,
                              int block) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    w.registers[i] = multiply_pair(Half{}, w.registers[i], scales.pairs[2 * block + i % 2]);
}

}  // namespace marlin
