// Dequantizing: each warp takes a tile, 512 bytes of words in one load, and passes its values through
// shared memory, since a lane holds pairs of rows and memory wants rows of 64 columns.
#include <type_traits>

#include "dequant/uint4.cuh"
#include "format/scale_order.h"
#include "format/weight_words.h"
#include "kernel/launch.h"

namespace marlin {
namespace {

constexpr int kWarps = 8;
constexpr int kBlocks = kTileColumns / 16;

// What stands for columns first + 8 j, j = 0 .. 7, in a row of scales or zero points.
template <typename Element>
struct alignas(8 * sizeof(Element)) ColumnEight {
  Element of[8];
};

template <typename Element>
__device__ ColumnEight<Element> load_eight(const Element* row, int64_t first, bool per_column) {
  // Grouped, they lie side by side (format/scale_order.h).
  if (!per_column)
    return *reinterpret_cast<const ColumnEight<Element>*>(row + scale_position(first, false));
  ColumnEight<Element> eight;
  for (int j = 0; j < 8; ++j) eight.of[j] = row[scale_position(first + 8 * j, true)];
  return eight;
}

__device__ float2 as_floats(__half2 pair) { return __half22float2(pair); }
__device__ float2 as_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }

template <typename Value>
struct Two {
  Value first, second;
};

// Two differences code - zero, exact in either half type, times their scale: rounded once.
template <typename Value, typename Scale>
__device__ Two<Value> scaled(uint32_t differences, Scale scale) {
  using Half = std::conditional_t<std::is_same_v<Value, float>, __half, Value>;
  using Pair = typename PairOf<Half>::type;
  const Pair pair = as_pair<Pair>(differences);
  if constexpr (std::is_same_v<Value, Scale>) {
    const Pair product = __hmul2(pair, Pair(scale, scale));
    return {product.x, product.y};
  } else {
    const float2 floats = as_floats(pair);
    const auto factor = static_cast<float>(scale);
    return {static_cast<Value>(floats.x * factor), static_cast<Value>(floats.y * factor)};
  }
}

// What that rounding takes off the exact products, itself rounded (seldom: FP16 has room for all of
// what its own scales leave, BF16 for any); nothing where a value is no longer finite.
template <typename Value, typename Scale>
__device__ Two<Value> remainder(uint32_t differences, Scale scale) {
  const float2 floats = as_floats(as_pair<typename PairOf<Value>::type>(differences));
  const auto factor = static_cast<float>(scale);
  const Two<Value> kept = scaled<Value>(differences, scale);
  auto left = [factor](float difference, Value value) {
    const auto rounded = static_cast<float>(value);
    return static_cast<Value>(isfinite(rounded) ? difference * factor - rounded : 0.0f);
  };
  return {left(floats.x, kept.first), left(floats.y, kept.second)};
}

template <typename Value, typename Scale, bool kRemainder>
__global__ void __launch_bounds__(32 * kWarps) dequantize_kernel(const DequantizeParams p) {
  using Half = std::conditional_t<std::is_same_v<Value, float>, __half, Value>;
  constexpr int kChunk = 16 / sizeof(Value);
  constexpr int kChunksPerRow = kTileColumns / kChunk;
  __shared__ __align__(16) Value staged[kWarps][kTileRows][kTileColumns + kChunk];

  const int lane = threadIdx.x % 32, column = lane / 4, row = 2 * (lane % 4);
  // Divisions of 64 bits would take as long as all the rest.
  const uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32;
  const auto strips = static_cast<uint32_t>(p.strips);
  const int64_t tile_row = tile / strips, strip = tile % strips;
  if (tile_row >= p.k / kTileRows) return;

  const int64_t source_strip = p.first_strip + strip;
  const uint32_t* words = p.words + tile_offset(tile_row, source_strip, p.n) + 4 * lane;
  const uint4 loaded = *reinterpret_cast<const uint4*>(words);
  const uint32_t word[kBlocks] = {loaded.x, loaded.y, loaded.z, loaded.w};
  const auto group_rows = static_cast<uint32_t>(p.k) / static_cast<uint32_t>(p.groups);
  const int64_t scale_row = tile / strips * kTileRows / group_rows * p.n;
  const int64_t first_column = source_strip * kTileColumns + column;
  const auto scales =
      load_eight(static_cast<const Scale*>(p.scales) + scale_row, first_column, p.groups == 1);
  ColumnEight<uint8_t> zeros;
  if (p.zeros != nullptr) zeros = load_eight(p.zeros + scale_row, first_column, p.groups == 1);

  auto& tile_values = staged[threadIdx.x / 32];
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const ptx::FragmentA differences =
        p.zeros == nullptr
            ? dequantize<Half>(word[block])
            : dequantize<Half>(word[block], zeros.of[2 * block], zeros.of[2 * block + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns c, c + 8; then eight rows further down
      const uint32_t pair = differences.registers[i];
      const Scale scale = scales.of[2 * block + i % 2];
      Two<Value> two;
      if constexpr (kRemainder) two = remainder<Value>(pair, scale);
      else two = scaled<Value>(pair, scale);
      const int r = row + 8 * (i / 2), c = 16 * block + column + 8 * (i % 2);
      tile_values[r][c] = two.first;
      tile_values[r + 1][c] = two.second;
    }
  }
  __syncwarp();

  const int64_t pitch = p.strips * kTileColumns;
  Value* target =
      static_cast<Value*>(p.values) + tile_row * kTileRows * pitch + strip * kTileColumns;
#pragma unroll
  for (int i = lane; i < kTileRows * kChunksPerRow; i += 32) {
    const int r = i / kChunksPerRow, c = i % kChunksPerRow * kChunk;
    *reinterpret_cast<uint4*>(target + r * pitch + c) =
        *reinterpret_cast<const uint4*>(&tile_values[r][c]);
  }
}

template <typename Value, bool kRemainder>
void launch(const DequantizeParams& params, cudaStream_t stream) {
  const int64_t tiles = params.k / kTileRows * params.strips;
  const auto ctas = static_cast<unsigned>((tiles + kWarps - 1) / kWarps);
  const auto kernel = params.scale_dtype == Dtype::kF16
                          ? dequantize_kernel<Value, __half, kRemainder>
                          : dequantize_kernel<Value, __nv_bfloat16, kRemainder>;
  kernel<<<ctas, 32 * kWarps, 0, stream>>>(params);
}

}  // namespace

cudaError_t launch_dequantize(const DequantizeParams& params, cudaStream_t stream) {
  DequantizeParams part = params;
  if (part.strips == 0) part.strips = part.n / kTileColumns;
  const bool remainder = part.remainder;
  switch (part.value_dtype) {
    case Dtype::kF16:
      (remainder ? launch<__half, true> : launch<__half, false>)(part, stream);
      break;
    case Dtype::kBF16:
      (remainder ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>)(part, stream);
      break;
    case Dtype::kF32:
      if (remainder) return cudaErrorInvalidValue;
      launch<float, false>(part, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace marlin
