// A multiplication as the kernels are given it: pointers, sizes, and each CTA's share.
#pragma once

#include <cstdint>

#include "core/partition.h"
#include "core/types.h"

namespace marlin {

struct GemmParams {
  const void* x;  // (m, k), rows x_pitch elements apart, 16-byte aligned
  int64_t x_pitch;
  const uint32_t* words;  // (k / 16, 2 n)
  const void* scales;     // (groups, n), in Marlin's order
  const void* bias;       // (n) or nullptr
  void* y;                // (m, n), contiguous
  int64_t m;
  int64_t n;
  int64_t k;
  int64_t group_rows;  // rows of W that share a scale; k if one for all
  Dtype scale_dtype;
  Dtype bias_dtype;
  const uint8_t* zeros = nullptr;  // (groups, n) like the scales; nullptr: all kCodeZero
};

// What CTAs use to add the sums of a slice they share.
struct Workspace {
  void* partials;      // [run][piece][thread of a depth group], 16 bytes each
  uint32_t* counters;  // [run], zero between launches
};

// A slice of Y, from its number: its first strip of 64 columns and its first row.
struct Slice {
  int64_t strip;
  int64_t first_row;

  constexpr Slice(int64_t slice, int row_tiles, int rows, int strips) {
    const auto index = static_cast<uint32_t>(slice), tiles = static_cast<uint32_t>(row_tiles);
    const uint32_t column = tiles == 1 ? index : index / tiles;
    strip = int64_t{column} * strips;
    first_row = int64_t{index - column * tiles} * rows;
  }
};

// A launch of either engine.
struct LaunchParams {
  GemmParams gemm;
  Partition partition;  // slices: strips of columns, and within each the tiles of rows
  int row_tiles;
  bool pairs;  // the two runs of every slice are a cluster (sm_90)
  Workspace workspace;
};

}  // namespace marlin
