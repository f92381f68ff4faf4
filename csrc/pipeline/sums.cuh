// The FP32 sums of a warp: 64 columns of Y (four blocks of 16) by its rows (batches of eight), in
// mma's accumulator layout, and what is done with them inside the main loop.
#pragma once

#include "dequant/uint4b8.cuh"
#include "pipeline/activations.cuh"
#include "pipeline/scales.cuh"
#include "pipeline/stage.cuh"
#include "pipeline/weights.cuh"
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

// kCount of a warp's four blocks.
template <CtaShape kShape, int kCount>
struct BlockSums {
  static constexpr int kBatches = kShape.rows_per_warp() / 8;

  ptx::Accumulator values[kCount][kBatches] = {};

  // += these blocks of one tile of W, from kFirst on, times the matching columns of X.
  template <typename Half, int kFirst>
  __device__ void multiply(const Stage<kShape>& stage, const Role<kShape>& role, int tile) {
    const Chunk words = words_of(stage, role, tile);
    ptx::FragmentA w[kCount];
#pragma unroll
    for (int block = 0; block < kCount; ++block)
      w[block] = dequantize<Half>(words.words[kFirst + block]);
#pragma unroll
    for (int batch = 0; batch < kBatches; batch += 2) {
      ActivationFragments<kShape> x;
      x.load(stage, role, tile, batch);
#pragma unroll
      for (int i = 0; i < 2 && batch + i < kBatches; ++i)
#pragma unroll
        for (int block = 0; block < kCount; ++block)
          ptx::mma<Half>(w[block], x.fragments[i], values[block][batch + i]);
    }
  }
};

template <CtaShape kShape>
struct Sums : BlockSums<kShape, kBlocks> {
  using BlockSums<kShape, kBlocks>::kBatches;
  using BlockSums<kShape, kBlocks>::values;
  static constexpr int kPieces = kBlocks * kBatches;  // float4s per lane

  // += others · scale, to blocks from kFirst on. An accumulator's first two values are the lane's
  // column, its last two the column 8 further.
  template <int kFirst, int kCount>
  __device__ void add_scaled(const BlockSums<kShape, kCount>& others, const ScaleFragment& scale) {
#pragma unroll
    for (int block = 0; block < kCount; ++block)
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = values[kFirst + block][batch].values[i];
          sum = fmaf(others.values[block][batch].values[i],
                     scale.values[2 * (kFirst + block) + i / 2], sum);
        }
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
