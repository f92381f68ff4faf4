// Where slices lie: in what order the tiles of Y, `rows` by `columns`, are numbered.
//
// Numbers go down a group of row tiles, then on to the next strip of columns, and when all strips
// are done to the next group. CTAs work on neighbouring numbers at the same time, so what they read
// together is about as many rows of X as strips of W:
//
//   group 0   0 4  8     group 1   12 16 20
//             1 5  9               13 17 21
//             2 6 10               ...
//             3 7 11
#pragma once

#include <cstdint>

namespace marlin {

struct Raster {
  uint32_t row_tiles;
  uint32_t strips;  // of columns, as wide as a slice
  uint32_t group;   // row tiles

  struct Place {
    uint32_t row_tile;
    uint32_t strip;

    constexpr bool operator==(const Place&) const = default;
  };

  constexpr Place place_of(uint32_t slice) const {
    if (row_tiles == 1) return {0, slice};
    const uint32_t first = slice / (group * strips) * group;  // of the group, in row tiles
    const uint32_t within = slice - first * strips;
    const uint32_t height = row_tiles - first < group ? row_tiles - first : group;
    return {first + within % height, within / height};
  }
};

}  // namespace marlin
