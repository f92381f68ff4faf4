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

  // += kCount blocks of one tile of W, from kFirst on, times the matching columns of X.
  // load_x(batch) gives the fragments of two batches.
  template <typename Half, int kFirst = 0, typename LoadX>
  __device__ void multiply(const Chunk& words, const LoadX& load_x) {
    ptx::FragmentA w[kCount];
#pragma unroll
    for (int block = 0; block < kCount; ++block)
      w[block] = dequantize<Half>(words.words[kFirst + block]);
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

  // += others · scale, to blocks from kFirst on. An accumulator's first two values are the lane's
  // column, its last two the column 8 further.
  template <int kFirst = 0, int kOthers>
  __device__ void add_scaled(const Sums<kBatches, kOthers>& others, const ScaleFragment& scale) {
#pragma unroll
    for (int block = 0; block < kOthers; ++block)
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
