// The FP32 sums of a warp: 64 columns of Y (four blocks of 16) by its rows (batches of eight), in
// mma's accumulator layout, and what is done with them inside the main loop.
#pragma once

#include "dequant/uint4b8.cuh"
#include "pipeline/activations.cuh"
#include "pipeline/scales.cuh"
#include "pipeline/stage.cuh"
#include "ptx/mma.cuh"

namespace marlin {

inline constexpr int kBlocks = kTileColumns / 16;

__device__ inline Chunk as_chunk(float4 v) {
  return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}
__device__ inline float4 as_float4(const Chunk& c) {
  return {__uint_as_float(c.words[0]), __uint_as_float(c.words[1]), __uint_as_float(c.words[2]),
          __uint_as_float(c.words[3])};
}

template <CtaShape kShape>
struct Sums {
  static constexpr int kBatches = kShape.rows_per_warp() / 8;
  static constexpr int kPieces = kBlocks * kBatches;  // float4s per lane

  ptx::Accumulator values[kBlocks][kBatches] = {};

  // += one tile of W times the matching columns of X, in units of W's scales.
  template <typename Half>
  __device__ void multiply(const Chunk& words, const ActivationFragments<kShape>& x) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const ptx::FragmentA w = dequantize<Half>(words.words[block]);
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch)
        ptx::mma<Half>(w, x.fragments[batch], values[block][batch]);
    }
  }

  // += others · scale. An accumulator's first two values are the lane's column, its last two the
  // column 8 further.
  __device__ void add_scaled(const Sums& others, const ScaleFragment& scale) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          values[block][batch].values[i] =
              fmaf(others.values[block][batch].values[i], scale.values[2 * block + i / 2],
                   values[block][batch].values[i]);
  }

  // The sums as 16-byte pieces, to hand on.
  __device__ float4 piece(int i) const {
    const float* v = values[i / kBatches][i % kBatches].values;
    return {v[0], v[1], v[2], v[3]};
  }

  __device__ void add_piece(int i, float4 other) {
    float* v = values[i / kBatches][i % kBatches].values;
    v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
  }
};

}  // namespace marlin
