// From the sums of all warps to a finished slice of Y, by all threads of the CTA:
//
//   registers --lay out--> rows in shared memory, one copy per depth group
//   --add the copies, four columns a thread--> --hand over, or scale and add the bias--> Y
//
// The copies lie in the stage that each depth group has just used up, so the copies of the next slice
// go on meanwhile. Where a stage is too small for all rows, they take turns.
#pragma once

#include "epilogue/handover.cuh"
#include "pipeline/elements.cuh"
#include "pipeline/sums.cuh"

namespace marlin {

// Some rows of a slice, laid over a stage. The pad makes rows two apart start 8 banks apart, so that
// the lanes of an accumulator (8 columns by 4 pairs of rows) write without conflicts.
template <CtaShape kShape>
struct RowTile {
  static constexpr int kPitch = kShape.columns() + 4;
  static constexpr int rows_that_fit(int rows) {
    return rows * kPitch * 4 <= static_cast<int>(sizeof(Stage<kShape>)) ? rows
                                                                        : rows_that_fit(rows / 2);
  }
  static constexpr int kRows = rows_that_fit(kShape.rows_per_warp());
  static_assert(kRows >= 8, "a batch of rows fits a stage");

  float sums[kRows][kPitch];

  __device__ void lay_out(const Sums<kShape>& source, const Role<kShape>& role, int first_batch) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int batch = 0; batch < kRows / 8; ++batch)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[8 * batch + 2 * role.fragment_pair + i % 2]
              [role.column_warp * kTileColumns + 16 * block + i / 2 * 8 + role.fragment_column] =
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
  int64_t row;
  int64_t column;
};

// The rows of a tile, laid out by all depth groups, that this thread brings to an end.
template <typename Half, bool kPerColumn, CtaShape kShape>
class RowFinisher {
  static constexpr int kQuads = kShape.columns() / 4;  // of columns, per row
  static constexpr int kStep = kShape.threads() / kQuads;
  static constexpr int kPerThread = RowTile<kShape>::kRows / kStep;
  static constexpr int kAtOnce = kPerThread < 4 ? kPerThread : 4;  // loads in flight
  static_assert(kStep * kQuads == kShape.threads() && kPerThread % kAtOnce == 0);

 public:
  __device__ RowFinisher(const GemmParams& params, const SliceOrigin& origin)
      : params_(params), origin_(origin) {}

  // `copies`: the tile of each depth group; `first`: its first row in the slice.
  __device__ void finish(const RowTile<kShape>* const (&copies)[kShape.depth_groups], int first,
                         const Handover<kShape>& handover) const {
#pragma unroll
    for (int start = 0; start < kPerThread; start += kAtOnce) {
      float4 sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sums[i] = copies[0]->at(row_of(start + i), column());
#pragma unroll
        for (int group = 1; group < kShape.depth_groups; ++group)
          sums[i] = sums[i] + copies[group]->at(row_of(start + i), column());
      }
      if (handover.owner()) add_others_and_store(sums, first, start, handover);
      else give(sums, first, start, handover);
    }
  }

 private:
  __device__ int column() const { return threadIdx.x % kQuads * 4; }
  __device__ int row_of(int i) const { return threadIdx.x / kQuads + i * kStep; }
  __device__ bool valid(int row) const {
    return origin_.row + row < params_.m && origin_.column + column() < params_.n;
  }

  __device__ void give(const float4 (&sums)[kAtOnce], int first, int start,
                       const Handover<kShape>& handover) const {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + row_of(start + i);
      if (valid(row)) handover.give(row, column(), sums[i]);
    }
  }

  __device__ void add_others_and_store(float4 (&sums)[kAtOnce], int first, int start,
                                       const Handover<kShape>& handover) const {
    for (int other = 1; other <= handover.others(); ++other) {
      float4 theirs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + row_of(start + i);
        theirs[i] = valid(row) ? handover.take(other, row, column()) : float4{};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[i] = sums[i] + theirs[i];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + row_of(start + i);
      if (valid(row))
        store_four<Half, kPerColumn>(params_, origin_.row + row, origin_.column + column(),
                                     sums[i]);
    }
  }

  const GemmParams& params_;
  SliceOrigin origin_;
};

template <typename Half, bool kPerColumn, CtaShape kShape>
__device__ void finish_slice(const Sums<kShape>& sums, const Role<kShape>& role,
                             SharedMemory<kShape>& shared, int free_slot, const GemmParams& params,
                             const SliceOrigin& origin, const Handover<kShape>& handover) {
  constexpr int kRows = RowTile<kShape>::kRows;
  const RowFinisher<Half, kPerColumn, kShape> finisher(params, origin);
  auto tile_of = [&](int group, int slot) {
    return reinterpret_cast<RowTile<kShape>*>(&shared.stages[group][slot]);
  };

  role.group_barrier();  // the group's warps have used up the stage
  if (role.group_thread == 0) shared.free_slots[role.depth_group] = free_slot;
#pragma unroll
  for (int first = 0; first < kShape.rows; first += kRows) {
    if (origin.row + first >= params.m) break;
    if (first > 0) __syncthreads();  // the rows before are done with
    if (role.row_warp == first / kShape.rows_per_warp())
      tile_of(role.depth_group, free_slot)->lay_out(sums, role, first % kShape.rows_per_warp() / 8);
    if (first == 0 && threadIdx.x == 0 && handover.owner()) handover.await_others();
    __syncthreads();

    const RowTile<kShape>* copies[kShape.depth_groups];
#pragma unroll
    for (int group = 0; group < kShape.depth_groups; ++group)
      copies[group] = tile_of(group, shared.free_slots[group]);
    finisher.finish(copies, first, handover);
  }
  if (!handover.owner()) handover.count_myself();
  __syncthreads();  // the stages may be filled again
}

}  // namespace marlin
