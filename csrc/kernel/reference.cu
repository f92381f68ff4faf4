// The simple kernel: Yᵀ = Wᵀ · Xᵀ with plain loads and mma.sync.
//
// A CTA owns 64 columns of Y (one strip of tiles) and 32 rows. Its four warps take every fourth
// tile of the strip and add their sums, in order, through shared memory. Each tile's product is
// scaled in FP32, so any scale, zero, negative, Inf or NaN, does what it does in the formula.
#include "dequant/uint4.cuh"
#include "format/scale_order.h"
#include "format/weight_words.h"
#include "kernel/launch.h"
#include "pipeline/elements.cuh"
#include "ptx/mma.cuh"

namespace marlin {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocks = kTileColumns / 16;  // 16 columns each: one A fragment
constexpr int kBatches = 4;                 // 8 rows of X each: one B fragment
constexpr int kRows = 8 * kBatches;

struct Lane {
  int warp = threadIdx.x / 32;
  int index = threadIdx.x % 32;
  int group = index / 4;  // a column of a block (and + 8); a row of X in a B fragment
  int pair = index % 4;   // rows 2 pair, 2 pair + 1 of a tile; rows of X in an accumulator
  __device__ Lane() {}
};

template <typename Half>
__device__ ptx::FragmentB load_x(const GemmParams& params, int64_t row, int64_t k) {
  if (row >= params.m) return {{0, 0}};
  const auto* x = static_cast<const Half*>(params.x) + row * params.x_pitch + k;
  return {{*reinterpret_cast<const uint32_t*>(x), *reinterpret_cast<const uint32_t*>(x + 8)}};
}

template <typename Half, bool kZeros>
__global__ void __launch_bounds__(32 * kWarps)
    reference_kernel(const GemmParams p, bool per_column) {
  const Lane lane;
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t strip = blockIdx.y;
  const int64_t first_column = strip * kTileColumns;
  float sums[kBlocks][kBatches][4] = {};

  for (int64_t tile = lane.warp; tile < p.k / kTileRows; tile += kWarps) {
    const uint32_t* words = p.words + tile_offset(tile, strip, p.n) + 4 * lane.index;
    const uint4 loaded = *reinterpret_cast<const uint4*>(words);
    const uint32_t word[kBlocks] = {loaded.x, loaded.y, loaded.z, loaded.w};
    const int64_t scale_row = tile * kTileRows / p.group_rows * p.n;

    ptx::FragmentB x[kBatches];
    for (int batch = 0; batch < kBatches; ++batch)
      x[batch] =
          load_x<Half>(p, first_row + 8 * batch + lane.group, tile * kTileRows + 2 * lane.pair);

#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int64_t column = first_column + 16 * block + lane.group;
      float scale[2];
      int zero[2] = {kCodeZero, kCodeZero};
      for (int half = 0; half < 2; ++half) {
        const int64_t place = scale_row + scale_position(column + 8 * half, per_column);
        scale[half] = load_element(p.scales, p.scale_dtype, place);
        if constexpr (kZeros) zero[half] = p.zeros[place];
      }
      const ptx::FragmentA w =
          kZeros ? dequantize<Half>(word[block], zero[0], zero[1]) : dequantize<Half>(word[block]);
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        ptx::Accumulator product = {};
        ptx::mma<Half>(w, x[batch], product);
        for (int i = 0; i < 4; ++i)
          sums[block][batch][i] = fmaf(scale[i / 2], product.values[i], sums[block][batch][i]);
      }
    }
  }

  // [warp][row][column]; the pad keeps the four pairs of a store in different banks.
  __shared__ float shared[kWarps][kRows][kTileColumns + 4];
  for (int block = 0; block < kBlocks; ++block)
    for (int batch = 0; batch < kBatches; ++batch)
      for (int i = 0; i < 4; ++i)
        shared[lane.warp][8 * batch + 2 * lane.pair + i % 2][16 * block + lane.group + i / 2 * 8] =
            sums[block][batch][i];
  __syncthreads();

  for (int i = threadIdx.x; i < kRows * kTileColumns; i += blockDim.x) {
    const int64_t row = first_row + i / kTileColumns, column = first_column + i % kTileColumns;
    if (row >= p.m) break;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp)
      sum += shared[warp][i / kTileColumns][i % kTileColumns];
    if (p.bias != nullptr) sum += load_element(p.bias, p.bias_dtype, column);
    static_cast<uint16_t*>(p.y)[row * p.n + column] = half_bits<Half>(sum);
  }
}

template <typename Half>
void launch(const GemmParams& params, const Problem& problem, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((params.m + kRows - 1) / kRows),
                  static_cast<unsigned>(params.n / kTileColumns));
  const auto kernel =
      params.zeros != nullptr ? reference_kernel<Half, true> : reference_kernel<Half, false>;
  kernel<<<grid, 32 * kWarps, 0, stream>>>(params, problem.per_column());
}

}  // namespace

cudaError_t launch_reference(const GemmParams& params, const Problem& problem,
                             cudaStream_t stream) {
  if (problem.activation == Dtype::kF16) launch<__half>(params, problem, stream);
  else launch<__nv_bfloat16>(params, problem, stream);
  return cudaGetLastError();
}

}  // namespace marlin
