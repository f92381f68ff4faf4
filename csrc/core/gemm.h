// A multiplication as the kernels are given it: pointers, sizes, and each CTA's share.
#pragma once

#include <cstdint>

#include "core/partition.h"
#include "core/raster.h"
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
  void* partials;      // [run], a slice of FP32 sums each: as epilogue/handover.cuh lays them out
  uint32_t* counters;  // [run][team], zero between launches
};

// A slice of Y, from its number: its first strip of 64 columns and its first row.
struct Slice {
  int strip;
  int first_row;

  // Slices are `rows` by `strips` strips of 64 columns.
  constexpr Slice(const Raster& raster, int64_t slice, int rows, int strips) {
    const Raster::Place place = raster.place_of(static_cast<uint32_t>(slice));
    strip = static_cast<int>(place.strip) * strips;
    first_row = static_cast<int>(place.row_tile) * rows;
  }
};

// A launch of either engine.
struct LaunchParams {
  GemmParams gemm;
  Partition partition;
  Raster raster;  // of the partition's slices
  bool pairs;     // the two runs of every slice are a cluster (sm_90)
  Workspace workspace;
};

}  // namespace marlin
