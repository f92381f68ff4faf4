#include "cpu/pack.h"

#include <cstring>

#include "core/half.h"
#include "format/scale_order.h"
#include "format/weight_words.h"

namespace marlin::cpu {
namespace {

void load_halves(const uint16_t* source, int64_t count, Dtype dtype, float* destination) {
  if (dtype == Dtype::kF16)
    for (int64_t i = 0; i < count; ++i) destination[i] = half_to_float(source[i]);
  else
    for (int64_t i = 0; i < count; ++i) destination[i] = bfloat16_to_float(source[i]);
}

// The eight words that share (pair, block) differ only in the lane's column, 0..7.
constexpr int kColumns = 8;
constexpr int word_index(int column, int pair, int block) {
  return 4 * (4 * column + pair) + block;
}

// Rows r and r + 8 of a pair share a byte of the word, so bytes are made for all 64 columns at once.
void pack_tile(const uint8_t* tile, int64_t n, uint32_t* words, uint8_t* seen) {
  for (int pair = 0; pair < 4; ++pair) {
    uint8_t bytes[2][kTileColumns];  // rows 2 pair + {0, 8} and 2 pair + {1, 9}
    for (int odd = 0; odd < 2; ++odd) {
      const uint8_t* low = tile + (2 * pair + odd) * n;
      const uint8_t* high = low + 8 * n;
      for (int c = 0; c < kTileColumns; ++c) {
        seen[c] |= low[c] | high[c];
        bytes[odd][c] = static_cast<uint8_t>((low[c] & 0xf) | high[c] << 4);
      }
    }
    for (int block = 0; block < 4; ++block) {
      for (int c = 0; c < kColumns; ++c) {
        const int left = 16 * block + c, right = left + 8;
        words[word_index(c, pair, block)] = static_cast<uint32_t>(bytes[0][left]) |
                                            static_cast<uint32_t>(bytes[0][right]) << 8 |
                                            static_cast<uint32_t>(bytes[1][left]) << 16 |
                                            static_cast<uint32_t>(bytes[1][right]) << 24;
      }
    }
  }
}

// The order of nibbles that pack_tile writes down is format/weight_words.h's.
static_assert(nibble_row(0) == 0 && nibble_row(1) == 8 && nibble_row(4) == 1 && nibble_row(5) == 9);
static_assert(nibble_column(0) == 0 && nibble_column(2) == 8 && nibble_column(4) == 0 &&
              nibble_column(6) == 8);

}  // namespace

uint8_t pack_tile_rows(const uint8_t* codes, int64_t n, int64_t first, int64_t last,
                       uint32_t* words) {
  uint8_t seen[kTileColumns] = {};
  for (int64_t tile_row = first; tile_row < last; ++tile_row)
    for (int64_t strip = 0; strip < n / kTileColumns; ++strip)
      pack_tile(codes + tile_row * kTileRows * n + strip * kTileColumns, n,
                words + tile_offset(tile_row, strip, n), seen);
  uint8_t all = 0;
  for (uint8_t bits : seen) all |= bits;
  return all;
}

void unpack_tile_rows(const uint32_t* words, int64_t n, int64_t first, int64_t last,
                      uint8_t* codes) {
  for (int64_t tile_row = first; tile_row < last; ++tile_row) {
    for (int64_t strip = 0; strip < n / kTileColumns; ++strip) {
      const uint32_t* in = words + tile_offset(tile_row, strip, n);
      uint8_t* tile = codes + tile_row * kTileRows * n + strip * kTileColumns;
      for (int pair = 0; pair < 4; ++pair) {
        for (int block = 0; block < 4; ++block) {
          uint32_t word[kColumns];
          for (int c = 0; c < kColumns; ++c) word[c] = in[word_index(c, pair, block)];
          for (int nibble = 0; nibble < kCodesPerWord; ++nibble) {
            uint8_t* target =
                tile + (2 * pair + nibble_row(nibble)) * n + 16 * block + nibble_column(nibble);
            for (int c = 0; c < kColumns; ++c) target[c] = word[c] >> (4 * nibble) & 0xf;
          }
        }
      }
    }
  }
}

template <typename Element>
void pack_scale_row(const Element* natural, int64_t n, bool per_column, Element* packed) {
  for (int64_t column = 0; column < n; ++column)
    packed[scale_position(column, per_column)] = natural[column];
}

template <typename Element>
void unpack_scale_row(const Element* packed, int64_t n, bool per_column, Element* natural) {
  for (int64_t column = 0; column < n; ++column)
    natural[column] = packed[scale_position(column, per_column)];
}

template void pack_scale_row(const uint8_t*, int64_t, bool, uint8_t*);
template void pack_scale_row(const uint16_t*, int64_t, bool, uint16_t*);
template void unpack_scale_row(const uint8_t*, int64_t, bool, uint8_t*);
template void unpack_scale_row(const uint16_t*, int64_t, bool, uint16_t*);

void load_strip_scales(const PackedWeight& weight, int64_t group, int64_t strip, float* scales) {
  uint16_t natural[kTileColumns];
  const int64_t offset = group * weight.n + strip * kTileColumns;
  unpack_scale_row(static_cast<const uint16_t*>(weight.scales) + offset, kTileColumns,
                   weight.groups == 1, natural);
  load_halves(natural, kTileColumns, weight.scale_dtype, scales);
}

void load_strip_zeros(const PackedWeight& weight, int64_t group, int64_t strip, int32_t* zeros) {
  uint8_t natural[kTileColumns];
  unpack_scale_row(weight.zeros + group * weight.n + strip * kTileColumns, kTileColumns,
                   weight.groups == 1, natural);
  for (int column = 0; column < kTileColumns; ++column) zeros[column] = natural[column];
}

void store_floats(const float* source, int64_t count, Dtype dtype, void* destination) {
  auto* half = static_cast<uint16_t*>(destination);
  switch (dtype) {
    case Dtype::kF32: std::memcpy(destination, source, count * sizeof(float)); break;
    case Dtype::kF16:
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_half(source[i]);
      break;
    case Dtype::kBF16:
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat16(source[i]);
      break;
  }
}

void load_floats(const void* source, int64_t count, Dtype dtype, float* destination) {
  if (dtype == Dtype::kF32) std::memcpy(destination, source, count * sizeof(float));
  else load_halves(static_cast<const uint16_t*>(source), count, dtype, destination);
}

}  // namespace marlin::cpu
