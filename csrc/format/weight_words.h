// The published Marlin weight format: which 4-bit code sits in which nibble of which word.
//
// W (k x n) is cut into tiles of 16 rows (k) by 64 columns (n); a tile is 128 words of 8 codes, and
// tiles lie row by row: B[k / 16][n / 64 tiles][128 words] = int32 (k / 16, 2 n).
//
//   word 4 * lane + block           lane = 4 * column + pair of a warp, block = 16 columns of the tile
//   nibble (low first)              0      1      2      3      4      5      6      7
//   row of the tile    2 * pair +   0      8      0      8      1      9      1      9
//   column of the block column +    0      0      8      8      0      0      8      8
//
// So one 16-byte load gives a lane its share of the four 16x16 blocks of a tile, in the order of
// the A operand of mma.m16n8k16 (and wgmma) on the transposed weight: nibble pairs (0,4), (2,6),
// (1,5), (3,7) are its registers a0 .. a3.
#pragma once

#include <cstdint>

namespace marlin {

inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 64;
inline constexpr int kTileWords = 128;
inline constexpr int kCodesPerWord = 8;
inline constexpr int kCodeZero = 8;  // value = (code - 8) * scale

struct TilePlace {
  int row;     // 0 .. 15, along k
  int column;  // 0 .. 63, along n
  constexpr bool operator==(const TilePlace&) const = default;
};

// The row of a nibble relative to 2 * pair, and its column relative to the lane's column.
constexpr int nibble_row(int nibble) { return (nibble & 1) * 8 + (nibble >> 2); }
constexpr int nibble_column(int nibble) { return ((nibble >> 1) & 1) * 8; }

constexpr TilePlace place_in_tile(int word, int nibble) {
  const int lane = word / 4, block = word % 4;
  const int column = lane / 4, pair = lane % 4;
  return {2 * pair + nibble_row(nibble), 16 * block + column + nibble_column(nibble)};
}

constexpr int word_of(TilePlace place) {
  const int block = place.column / 16, column = place.column % 8, pair = (place.row % 8) / 2;
  return 4 * (4 * column + pair) + block;
}

constexpr int nibble_of(TilePlace place) {
  return (place.row / 8) + 2 * ((place.column / 8) % 2) + 4 * (place.row % 2);
}

constexpr bool places_are_a_bijection() {
  for (int word = 0; word < kTileWords; ++word) {
    for (int nibble = 0; nibble < kCodesPerWord; ++nibble) {
      const TilePlace place = place_in_tile(word, nibble);
      if (word_of(place) != word || nibble_of(place) != nibble) return false;
    }
  }
  return true;
}
static_assert(places_are_a_bijection());

constexpr int64_t words_in_tile_row(int64_t n) { return n / kTileColumns * kTileWords; }

// Index of the first word of tile (tile_row, strip); a strip is a column of tiles.
constexpr int64_t tile_offset(int64_t tile_row, int64_t strip, int64_t n) {
  return tile_row * words_in_tile_row(n) + strip * kTileWords;
}

}  // namespace marlin
