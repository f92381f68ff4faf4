// Packing, unpacking and dequantizing on the host, for a range of tile rows each, so that callers
// bring their own threads. All permutations come from format/.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace marlin::cpu {

// A packed weight as the rooms below Torch see it: W is k x n, both in units of elements.
struct PackedWeight {
  const uint32_t* words;  // (k / 16, 2 n)
  const void* scales;     // (groups, n), in Marlin's order
  Dtype scale_dtype;
  int64_t k;
  int64_t n;
  int64_t groups;
  const uint8_t* zeros = nullptr;  // (groups, n) like the scales; nullptr: all kCodeZero
};

// codes: (k, n) bytes, values 0..15. Returns the OR of all bytes read, so that a caller can tell
// whether any code was out of range without another pass over them.
uint8_t pack_tile_rows(const uint8_t* codes, int64_t n, int64_t first, int64_t last,
                       uint32_t* words);

void unpack_tile_rows(const uint32_t* words, int64_t n, int64_t first, int64_t last,
                      uint8_t* codes);

// Reorders one row of n scales (uint16_t) or zero points (uint8_t) into Marlin's order, or back.
template <typename Element>
void pack_scale_row(const Element* natural, int64_t n, bool per_column, Element* packed);
template <typename Element>
void unpack_scale_row(const Element* packed, int64_t n, bool per_column, Element* natural);

// FP32 values of the 64 scales of `strip` in group `group`, in natural column order.
void load_strip_scales(const PackedWeight& weight, int64_t group, int64_t strip, float* scales);

// Likewise the zero points, of a weight that has them.
void load_strip_zeros(const PackedWeight& weight, int64_t group, int64_t strip, int32_t* zeros);

// Writes `count` floats as `dtype`, or reads them.
void store_floats(const float* source, int64_t count, Dtype dtype, void* destination);
void load_floats(const void* source, int64_t count, Dtype dtype, float* destination);

}  // namespace marlin::cpu
