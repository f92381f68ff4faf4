// Shared memory of the sm_80 engine as a struct. No CUDA in here: the size decides on the host, too,
// which shapes a GPU can run.
#pragma once

#include <cstdint>
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

// Bytes of partial sums that a run leaves for the owner of a shared slice.
constexpr int64_t partial_bytes(const CtaShape& shape) {
  return int64_t{shape.rows} * shape.columns() * static_cast<int64_t>(sizeof(float));
}

}  // namespace marlin
