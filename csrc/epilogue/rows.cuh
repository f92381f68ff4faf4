// Rows of finished sums: laid out in shared memory, read back along the columns of Y, added, stored.
#pragma once

#include "epilogue/handover.cuh"
#include "format/scale_order.h"
#include "pipeline/elements.cuh"
#include "pipeline/sums.cuh"

namespace marlin {

// Some rows of a slice. The pad makes rows two apart start 8 banks apart, so that the lanes of an
// accumulator (8 columns by 4 pairs of rows) write without conflicts.
template <int kTileRowCount, int kTileColumnCount>
struct RowTile {
  static constexpr int kRows = kTileRowCount;
  static constexpr int kColumns = kTileColumnCount;

  float sums[kRows][kColumns + 4];

  // All kRows rows, from the sums' batch `first_batch` on. `column`: of the lane, in block 0; `pair`:
  // of the lane's rows in a batch.
  template <int kBatches, int kCount>
  __device__ void lay_out(const Sums<kBatches, kCount>& source, int first_batch, int column,
                          int pair) {
#pragma unroll
    for (int block = 0; block < kCount; ++block)
#pragma unroll
      for (int batch = 0; batch < kRows / 8; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[8 * batch + 2 * pair + i % 2][16 * block + i / 2 * 8 + column] =
              source.values[block][first_batch + batch].values[i];
  }

  __device__ float4 at(int row, int column) const {
    return *reinterpret_cast<const float4*>(&sums[row][column]);
  }
};

__device__ inline float4 operator+(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// Four finished columns of one row: the per-column scale, the bias, one rounding.
template <typename Half, bool kPerColumn>
__device__ void store_four(const GemmParams& params, int64_t row, int64_t column, float4 sums) {
  float values[4] = {sums.x, sums.y, sums.z, sums.w};
  uint32_t bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kPerColumn)
      values[i] *=
          load_element(params.scales, params.scale_dtype, scale_position(column + i, true));
    if (params.bias != nullptr)
      values[i] += load_element(params.bias, params.bias_dtype, column + i);
    bits[i] = half_bits<Half>(values[i]);
  }
  auto* y = static_cast<uint16_t*>(params.y) + row * params.n + column;
  *reinterpret_cast<uint2*>(y) = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
}

// The first column and row of Y in a slice.
struct SliceOrigin {
  int row;
  int column;
};

// The part of a tile's rows, of which there are kCopies to add, that one of kThreads threads brings to
// an end.
template <typename Half, bool kPerColumn, typename Tile, int kCopies, int kThreads>
class RowFinisher {
  static constexpr int kQuads = Tile::kColumns / 4;  // of columns, per row
  // Rows between those of a thread; threads beyond the last row have none.
  static constexpr int kStep = kThreads / kQuads < Tile::kRows ? kThreads / kQuads : Tile::kRows;
  static constexpr int kPerThread = Tile::kRows / kStep;
  // Loads in flight.
  static constexpr int kAtOnce = kPerThread < 4 ? kPerThread : kPerThread % 4 == 0 ? 4 : 3;
  static_assert(kStep * kPerThread == Tile::kRows && kPerThread % kAtOnce == 0);

 public:
  __device__ RowFinisher(const GemmParams& params, const SliceOrigin& origin, int thread)
      : params_(params), origin_(origin), column_(thread % kQuads * 4), row_(thread / kQuads) {}

  // `first`: the tile's first row in the slice.
  template <typename Handover>
  __device__ void finish(const Tile* const (&copies)[kCopies], int first,
                         const Handover& handover) const {
    if (row_ >= kStep) return;
#pragma unroll
    for (int start = 0; start < kPerThread; start += kAtOnce) {
      float4 sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sums[i] = copies[0]->at(row_of(start + i), column_);
#pragma unroll
        for (int copy = 1; copy < kCopies; ++copy)
          sums[i] = sums[i] + copies[copy]->at(row_of(start + i), column_);
      }
      if (handover.owner()) add_others_and_store(sums, first, start, handover);
      else give(sums, first, start, handover);
    }
  }

 private:
  __device__ int row_of(int i) const { return row_ + i * kStep; }
  __device__ bool valid(int row) const {
    return origin_.row + row < params_.m && origin_.column + column_ < params_.n;
  }

  template <typename Handover>
  __device__ void give(const float4 (&sums)[kAtOnce], int first, int start,
                       const Handover& handover) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + row_of(start + i);
      if (valid(row)) handover.give(row, column_, sums[i]);
    }
  }

  template <typename Handover>
  __device__ void add_others_and_store(float4 (&sums)[kAtOnce], int first, int start,
                                       const Handover& handover) const {
    // All loads before the first addition: L2 takes its time, however many ask.
    constexpr int kOthers = 3;
#pragma unroll 1
    for (int other = 1; other <= handover.others(); other += kOthers) {
      float4 theirs[kOthers][kAtOnce];
#pragma unroll
      for (int j = 0; j < kOthers; ++j)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = first + row_of(start + i);
          const bool there = other + j <= handover.others() && valid(row);
          theirs[j][i] = there ? handover.take(other + j, row, column_) : float4{};
        }
#pragma unroll
      for (int j = 0; j < kOthers; ++j)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) sums[i] = sums[i] + theirs[j][i];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + row_of(start + i);
      if (valid(row))
        store_four<Half, kPerColumn>(params_, origin_.row + row, origin_.column + column_, sums[i]);
    }
  }

  const GemmParams& params_;
  SliceOrigin origin_;
  int column_;
  int row_;
};

}  // namespace marlin
