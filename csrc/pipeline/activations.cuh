// X: rows of 16-bit activations, global -> shared (swizzled) -> B fragments.
#pragma once

#include "pipeline/stage.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace marlin {

// The threads of a depth group share the 16-byte chunks of a stage; rows past m and columns past k
// become zeros.
template <CtaShape kShape>
class ActivationCopy {
  static constexpr int kRowsAtOnce = kShape.group_threads() / kSwizzleChunks;
  static constexpr int kCopies = (kShape.rows + kRowsAtOnce - 1) / kRowsAtOnce;

 public:
  __device__ void seek(const GemmParams& params, const Role<kShape>& role, int64_t first_row,
                       int tile) {
    const int row = role.group_thread / kSwizzleChunks;
    const int column = kStageRows * tile + role.group_thread % kSwizzleChunks * 8;
    pitch_ = params.x_pitch;
    source_ = static_cast<const uint16_t*>(params.x) + (first_row + row) * pitch_ + column;
    columns_left_ = static_cast<int>(params.k) - column;
    const int64_t rows_left = params.m - first_row - row;
    rows_left_ = static_cast<int>(rows_left < kShape.rows ? rows_left : kShape.rows);
  }

  __device__ void load(Stage<kShape>& stage, const Role<kShape>& role) const {
    const int row = role.group_thread / kSwizzleChunks;
    const int chunk = role.group_thread % kSwizzleChunks;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int first = i * kRowsAtOnce;
      if (kShape.rows % kRowsAtOnce != 0 && first + row >= kShape.rows) break;
      ptx::cp_async(&stage.activations[first + row][swizzled_chunk(first + row, chunk)],
                    source_ + first * pitch_, first < rows_left_ && columns_left_ > 0);
    }
  }

  __device__ void advance() {
    source_ += kStageRows * kShape.depth_groups;
    columns_left_ -= kStageRows * kShape.depth_groups;
  }

 private:
  const uint16_t* source_;
  int64_t pitch_;
  int columns_left_;
  int rows_left_;
};

// B fragments of one tile along k (16 columns of X) for all of a warp's rows, eight rows each.
template <CtaShape kShape>
struct ActivationFragments {
  static constexpr int kBatches = kShape.rows_per_warp() / 8;
  ptx::FragmentB fragments[kBatches];

  __device__ void load(const Stage<kShape>& stage, const Role<kShape>& role, int tile) {
    const int first_row = role.row_warp * kShape.rows_per_warp();
    if constexpr (kBatches == 1) {
      // One fragment is two of ldmatrix' four matrices; the other two are read and dropped.
      uint32_t matrices[4];
      const int row = first_row + role.lane % 8, chunk = 2 * tile + role.lane / 8 % 2;
      ptx::ldmatrix(matrices, &stage.activations[row][swizzled_chunk(row, chunk)]);
      fragments[0] = {{matrices[0], matrices[1]}};
    } else {
#pragma unroll
      for (int batch = 0; batch < kBatches; batch += 2) {
        uint32_t matrices[4];  // rows 0-7: columns 0-7, 8-15; rows 8-15: the same
        const int row = first_row + 8 * batch + role.lane % 8 + role.lane / 16 * 8;
        const int chunk = 2 * tile + role.lane / 8 % 2;
        ptx::ldmatrix(matrices, &stage.activations[row][swizzled_chunk(row, chunk)]);
        fragments[batch] = {{matrices[0], matrices[1]}};
        fragments[batch + 1] = {{matrices[2], matrices[3]}};
      }
    }
  }
};

}  // namespace marlin
