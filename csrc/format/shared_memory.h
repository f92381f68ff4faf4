// Shared memory of both engines as structs. No CUDA in here: the size decides on the host, too, which
// shapes a GPU can run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/config.h"
#include "format/swizzle.h"
#include "format/weight_words.h"

namespace marlin {

struct alignas(16) Chunk {  // what one lane copies at once
  uint32_t words[4];
};

// `depth` rows of W, a strip of columns wide; the same columns of X; the scales of those rows.
template <CtaShape kShape>
struct Stage {
  static constexpr int kTiles = kShape.depth / kTileRows;       // of W, along k
  static constexpr int kPanels = kShape.depth / kPanelColumns;  // of X
  static constexpr int kMaxGroups = kShape.depth / 32;

  Chunk words[kTiles][kShape.column_warps][32];             // as they lie in memory, tile by tile
  Chunk activations[kPanels][kShape.rows][kSwizzleChunks];  // chunks swizzled
  Chunk scales[kMaxGroups][kShape.column_warps][8];         // 64 halves per column warp
};

template <CtaShape kShape>
struct SharedMemory {
  Stage<kShape> stages[kShape.depth_groups][kShape.stages];
  int free_slots[kShape.depth_groups];  // each group's stage that the epilogue may use
};

// Bytes of shared memory per CTA, by shape.
inline constexpr auto kSm80SharedBytes = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
  return std::array{sizeof(SharedMemory<kSm80Shapes[kIndex].shape>)...};
}
(std::make_index_sequence<kSm80Shapes.size()>{});

// How the scales of a stage multiply weights (pipeline/prepare_scales.cuh).
struct ScaleForm {
  int passes;  // over the stage; 0: one, fused with the dequantization
  int unit;    // log2 of what one is in the sums
};

// Shared memory of the sm_90 engine: rings of stages, and room to lay out finished rows.
template <Sm90Shape kShape>
struct Sm90Shared {
  static constexpr int kTiles = kShape.depth / kTileRows;       // of W, along k
  static constexpr int kPanels = kShape.depth / kPanelColumns;  // of X
  static constexpr int kStrips = kShape.columns / kTileColumns;
  static constexpr int kMaxGroups = kShape.depth / 32;
  static constexpr int kCopies = kShape.sets * kShape.parts();
  static constexpr int kTeamColumns = kShape.columns / kShape.teams();

  // With mma.sync, finished rows: a copy for each part of the depth, and the partner's.
  static constexpr int kRowsBytes = (kCopies + 1) * kShape.rows * (kShape.columns + 4) * 4;
  // With wgmma, what the other sets have, or rows as halves, a few at a time.
  static constexpr int kSetsBytes = (kShape.sets - 1) * kShape.rows * kShape.columns * 4;
  static constexpr int kHalfRows = kShape.rows % 32 == 0 ? 32 : 16;
  static constexpr int kHalvesBytes = kShape.teams() * kHalfRows * (kTeamColumns + 8) * 2;
  static constexpr int kFinishedBytes = !kShape.wgmma               ? kRowsBytes
                                        : kSetsBytes > kHalvesBytes ? kSetsBytes
                                                                    : kHalvesBytes;

  Chunk activations[kShape.stages][kPanels][kShape.rows][kSwizzleChunks];  // aligned to 1024 bytes
  Chunk words[kShape.stages][kTiles][kStrips][32];
  Chunk scales[kShape.stages][kMaxGroups][kStrips][8];
  Chunk finished[kFinishedBytes / static_cast<int>(sizeof(Chunk))];
  uint64_t full[kShape.stages];  // mbarriers
  uint64_t empty[kShape.stages];
  uint64_t scales_full[kShape.stages];
  uint64_t partner_free[kShape.teams()];  // the other CTA of a pair needs its ring no more,
  uint64_t partner_sums[kShape.teams()];  // and what it had for this one has arrived
  ScaleForm scale_forms[kShape.stages];   // of scales that multiply weights
};

// Where copies by boxes may go: whole boxes to multiples of 128 bytes, swizzled ones of 1024.
template <Sm90Shape kShape>
constexpr bool boxes_are_aligned() {
  using Shared = Sm90Shared<kShape>;
  using Scales = std::remove_extent_t<decltype(Shared::scales)>;
  return offsetof(Shared, activations) % 1024 == 0 && offsetof(Shared, words) % 128 == 0 &&
         offsetof(Shared, scales) % 128 == 0 && sizeof(Scales) % 128 == 0;
}
static_assert([]<size_t... kIndex>(std::index_sequence<kIndex...>) {
  return (boxes_are_aligned<kSm90Shapes[kIndex].shape>() && ...);
}(std::make_index_sequence<kSm90Shapes.size()>{}));

inline constexpr auto kSm90SharedBytes = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
  return std::array{sizeof(Sm90Shared<kSm90Shapes[kIndex].shape>)...};
}
(std::make_index_sequence<kSm90Shapes.size()>{});

constexpr bool all_fit(int64_t limit) {
  for (size_t bytes : kSm90SharedBytes)
    if (static_cast<int64_t>(bytes) > limit) return false;
  return true;
}
static_assert(all_fit(227 * 1024), "what a block may have on Hopper");

constexpr int64_t shared_bytes(const KernelConfig& config) {
  return static_cast<int64_t>(config.engine == Engine::kSm80 ? kSm80SharedBytes[config.shape]
                                                             : kSm90SharedBytes[config.shape]);
}

// Bytes of partial sums that a run leaves for the owner of a shared slice.
constexpr int64_t partial_bytes(const KernelConfig& config) {
  const TileShape tile = tile_shape(config);
  return int64_t{tile.rows} * tile.columns * static_cast<int64_t>(sizeof(float));
}

// Counters that a run may need.
constexpr int counters_per_run(const KernelConfig& config) {
  return config.engine == Engine::kSm80 ? 1 : kSm90Shapes[config.shape].shape.all_teams();
}

}  // namespace marlin
