// X: rows of 16-bit activations, global -> shared (swizzled) -> B fragments.
#pragma once

#include "pipeline/stage.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

namespace marlin {

// The threads of a depth group share the 16-byte chunks of a stage; rows past m and columns past k
// become zeros. Offsets count chunks, so that 32 bits reach 64 GB of X
// (torch/checks.cpp refuses more) and spare registers.
template <CtaShape kShape>
class ActivationCopy {
  static constexpr int kRowsAtOnce = kShape.group_threads() / kSwizzleChunks;
  static constexpr int kCopies = (kShape.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  static constexpr int kPanels = Stage<kShape>::kPanels;
  static constexpr int kStageChunks = kPanels * kSwizzleChunks;  // along k

 public:
  __device__ void seek(const GemmParams& params, const Role<kShape>& role, int64_t first_row,
                       int tile) {
    const int64_t row = first_row + role.group_thread / kSwizzleChunks;
    const int chunk = kStageChunks * tile + role.group_thread % kSwizzleChunks;
    offset_ = static_cast<uint32_t>(row * (params.x_pitch / 8) + chunk);
    chunks_left_ = static_cast<int>(params.k / 8) - chunk;
    const int64_t rows_left = params.m - row;
    rows_left_ = static_cast<int>(rows_left < kShape.rows ? rows_left : kShape.rows);
  }

  __device__ void load(Stage<kShape>& stage, const GemmParams& params,
                       const Role<kShape>& role) const {
    const auto* x = static_cast<const Chunk*>(params.x);
    const uint32_t pitch = static_cast<uint32_t>(params.x_pitch / 8);
    const int row = role.group_thread / kSwizzleChunks;
    const int chunk = role.group_thread % kSwizzleChunks;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int first = i * kRowsAtOnce;
      if (kShape.rows % kRowsAtOnce != 0 && first + row >= kShape.rows) break;
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int ahead = panel * kSwizzleChunks;
        ptx::cp_async(&stage.activations[panel][first + row][swizzled_chunk(first + row, chunk)],
                      x + (offset_ + first * pitch + ahead),
                      first < rows_left_ && ahead < chunks_left_);
      }
    }
  }

  __device__ void advance() {
    offset_ += kStageChunks * kShape.depth_groups;
    chunks_left_ -= kStageChunks * kShape.depth_groups;
  }

 private:
  uint32_t offset_;
  int chunks_left_;
  int rows_left_;
};

// B fragments of one tile along k (16 columns of X) for two batches of eight rows.
struct ActivationFragments {
  ptx::FragmentB fragments[2];

  // Batches `batch` and `batch + 1` of the rows from `first_row` on; with kSingle the second is junk.
  // `rows`: panels of X, each kRows rows high.
  template <bool kSingle, int kRows>
  __device__ void load(const Chunk (*panels)[kRows][kSwizzleChunks], int lane, int first_row,
                       int tile, int batch) {
    // ldmatrix' four: rows 0-7 with columns 0-7 and 8-15, then rows 8-15 with the same.
    const int row = first_row + 8 * batch + lane % 8 + (kSingle ? 0 : lane / 16 * 8);
    constexpr int kPanelTiles = kPanelColumns / kTileRows;
    const int panel = tile / kPanelTiles, chunk = 2 * (tile % kPanelTiles) + lane / 8 % 2;
    uint32_t matrices[4];
    ptx::ldmatrix(matrices, &panels[panel][row][swizzled_chunk(row, chunk)]);
    fragments[0] = {{matrices[0], matrices[1]}};
    fragments[1] = {{matrices[2], matrices[3]}};
  }
};

}  // namespace marlin
