// Packing and unpacking on the device: one CTA of 128 threads a tile, which passes through shared
// memory so that both sides of the permutation are read and written in whole rows.
#include "format/scale_order.h"
#include "format/weight_words.h"
#include "kernel/launch.h"

namespace marlin {
namespace {

constexpr int kThreads = kTileWords;
constexpr int kChunk = 8;  // neighbouring columns that a thread reads or writes at once
constexpr int kChunksPerRow = kTileColumns / kChunk;

// A tile's place in W, and this thread's chunk of it.
struct Tile {
  int64_t row = blockIdx.x;
  int64_t strip = blockIdx.y;
  int chunk_row = threadIdx.x / kChunksPerRow;
  int chunk_column = threadIdx.x % kChunksPerRow * kChunk;
  __device__ Tile() {}

  __device__ int64_t element(int64_t n) const {
    return (row * kTileRows + chunk_row) * n + strip * kTileColumns + chunk_column;
  }
  __device__ int64_t word(int64_t n) const { return tile_offset(row, strip, n) + threadIdx.x; }
};

__device__ uint32_t code_at(const uint32_t* words, int row, int column) {
  const TilePlace place{row, column};
  return words[word_of(place)] >> (4 * nibble_of(place)) & 0xf;
}

__global__ void pack_kernel(const uint8_t* codes, int64_t n, uint32_t* words) {
  __shared__ uint8_t tile_codes[kTileRows][kTileColumns];
  const Tile tile;
  *reinterpret_cast<uint2*>(&tile_codes[tile.chunk_row][tile.chunk_column]) =
      *reinterpret_cast<const uint2*>(codes + tile.element(n));
  __syncthreads();
  uint32_t word = 0;
  for (int nibble = 0; nibble < kCodesPerWord; ++nibble) {
    const TilePlace place = place_in_tile(threadIdx.x, nibble);
    word |= static_cast<uint32_t>(tile_codes[place.row][place.column] & 0xf) << (4 * nibble);
  }
  words[tile.word(n)] = word;
}

__global__ void unpack_kernel(const uint32_t* words, int64_t n, uint8_t* codes) {
  __shared__ uint32_t tile_words[kTileWords];
  const Tile tile;
  tile_words[threadIdx.x] = words[tile.word(n)];
  __syncthreads();
  for (int i = 0; i < kChunk; ++i)
    codes[tile.element(n) + i] =
        static_cast<uint8_t>(code_at(tile_words, tile.chunk_row, tile.chunk_column + i));
}

template <typename Element>
__global__ void reorder_scales_kernel(const Element* source, int64_t n, bool per_column, bool pack,
                                      Element* target) {
  const int64_t column = int64_t{blockIdx.y} * kTileColumns + threadIdx.x;
  const int64_t row = int64_t{blockIdx.x} * n;
  const int64_t position = scale_position(column, per_column);
  if (pack) target[row + position] = source[row + column];
  else target[row + column] = source[row + position];
}

dim3 tile_grid(int64_t k, int64_t n) {
  return dim3(static_cast<unsigned>(k / kTileRows), static_cast<unsigned>(n / kTileColumns));
}

template <typename Element>
void reorder_scales(const void* source, int64_t groups, int64_t n, bool pack, void* target,
                    cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(n / kTileColumns));
  reorder_scales_kernel<<<grid, kTileColumns, 0, stream>>>(
      static_cast<const Element*>(source), n, groups == 1, pack, static_cast<Element*>(target));
}

}  // namespace

cudaError_t launch_pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words,
                        cudaStream_t stream) {
  pack_kernel<<<tile_grid(k, n), kThreads, 0, stream>>>(codes, n, words);
  return cudaGetLastError();
}

cudaError_t launch_unpack(const uint32_t* words, int64_t k, int64_t n, uint8_t* codes,
                          cudaStream_t stream) {
  unpack_kernel<<<tile_grid(k, n), kThreads, 0, stream>>>(words, n, codes);
  return cudaGetLastError();
}

cudaError_t launch_reorder_scales(const void* source, int element_bytes, int64_t groups, int64_t n,
                                  bool pack, void* target, cudaStream_t stream) {
  const auto reorder = element_bytes == 1 ? reorder_scales<uint8_t> : reorder_scales<uint16_t>;
  reorder(source, groups, n, pack, target, stream);
  return cudaGetLastError();
}

}  // namespace marlin
