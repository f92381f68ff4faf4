// The FP32 sums of a warp: 64 columns of Y (four blocks of 16) by its rows (batches of eight), in
// mma's accumulator layout, and what is done with them inside the main loop.
#pragma once

#include "dequant/uint4b8.cuh"
#include "pipeline/activations.cuh"
#include "pipeline/scales.cuh"
#include "ptx/mma.cuh"

namespace marlin {

inline constexpr int kBlocks = kTileColumns / 16;

// kCount blocks of columns by kBatches batches of rows.
template <int kBatches, int kCount = kBlocks>
struct Sums {
  ptx::Accumulator values[kCount][kBatches] = {};

  // += one tile of W times the matching columns of X. dequantized(word, block) gives a block's weights,
  // load_x(batch) the fragments of two batches.
  template <typename Half, typename Dequantized, typename LoadX>
  __device__ void multiply(const Chunk& words, const Dequantized& dequantized,
                           const LoadX& load_x) {
    ptx::FragmentA w[kCount];
#pragma unroll
    for (int block = 0; block < kCount; ++block) w[block] = dequantized(words.words[block], block);
#pragma unroll
    for (int batch = 0; batch < kBatches; batch += 2) {
      const ActivationFragments x = load_x(batch);
#pragma unroll
      for (int i = 0; i < 2 && batch + i < kBatches; ++i)
#pragma unroll
        for (int block = 0; block < kCount; ++block)
          ptx::mma<Half>(w[block], x.fragments[i], values[block][batch + i]);
    }
  }

  // += others · scale.
  __device__ void add_scaled(const Sums& others, const ScaleFragment& scale) {
    for_each([&](float& sum, int block, int batch, int i) {
      sum = fmaf(others.values[block][batch].values[i], scale.values[2 * block + i / 2], sum);
    });
  }

  // [2 block + half]: for each of the lane's columns.
  __device__ void multiply_columns(const float (&factors)[2 * kCount]) {
    for_each([&](float& sum, int block, int, int i) { sum *= factors[2 * block + i / 2]; });
  }

 private:
  // An accumulator's first two values are the lane's column, its last two the column 8 further.
  template <typename Visit>
  __device__ void for_each(const Visit& visit) {
#pragma unroll
    for (int block = 0; block < kCount; ++block)
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i) visit(values[block][batch].values[i], block, batch, i);
  }
};

}  // namespace marlin
