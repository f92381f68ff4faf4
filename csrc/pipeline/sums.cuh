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
};

}  // namespace marlin
