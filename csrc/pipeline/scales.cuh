// Scales of groups, global -> shared -> registers. In Marlin's grouped order the eight scales that a
// lane needs (its column and the one 8 further, in each of four blocks) are 16 neighbouring bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "format/scale_order.h"
#include "pipeline/stage.cuh"
#include "ptx/cp_async.cuh"

namespace marlin {

static_assert(grouped_position(1) - grouped_position(0) == 8 && grouped_position(8) == 1,
              "columns c, c + 8, c + 16, … of a lane are neighbours");

// Per stage kGroups rows of scales: one also where a group is longer than a stage.
template <CtaShape kShape, int kGroups>
class ScaleCopy {
  static constexpr int kChunks = kShape.column_warps * 8;  // per row of scales
  static constexpr int kCopies = kGroups * kChunks;
  static_assert(kCopies <= kShape.group_threads());

 public:
  __device__ void seek(const GemmParams& params, const Role<kShape>& role, int64_t strip,
                       int tile) {
    chunk_ = static_cast<int>(strip) * 8 + role.group_thread % kChunks;
    copies_ = role.group_thread < kCopies && chunk_ < params.n / 8;
    tile_ = tile;
  }

  __device__ void load(Stage<kShape>& stage, const GemmParams& params,
                       const Role<kShape>& role) const {
    if (!copies_) return;
    const int group = role.group_thread / kChunks, chunk = role.group_thread % kChunks;
    const int stages_per_group_log2 = params.group_rows > kShape.depth ? 1 : 0;
    static_assert(kShape.depth >= 64, "a group is at most two stages long");
    const int64_t row = (tile_ * kGroups + group) >> stages_per_group_log2;
    ptx::cp_async(&stage.scales[group][chunk / 8][chunk % 8],
                  static_cast<const Chunk*>(params.scales) + row * (params.n / 8) + chunk_,
                  row * params.group_rows < params.k);
  }

  __device__ void advance() { tile_ += kShape.depth_groups; }

 private:
  int chunk_;
  int tile_;
  bool copies_;
};

__device__ inline float scale_value(uint16_t bits, Dtype dtype) {
  return dtype == Dtype::kF16 ? __half2float(__ushort_as_half(bits))
                              : __bfloat162float(__ushort_as_bfloat16(bits));
}

// values[2 block + half]: column 16 block + 8 half + fragment_column of the warp's strip.
struct ScaleFragment {
  float values[8];

  ScaleFragment() = default;
  __device__ ScaleFragment(const Chunk& halves, Dtype dtype) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      values[i] = scale_value(static_cast<uint16_t>(halves.words[i / 2] >> (16 * (i % 2))), dtype);
  }
};

}  // namespace marlin
