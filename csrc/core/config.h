// Kernel configurations: what selection returns, launch takes, and tests ask for by name.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/types.h"

namespace marlin {

// The shape of a CTA of the sm_80 engine. Its warps form depth_groups x row_warps x column_warps.
//   rows        of X, shared evenly by the row warps
//   columns     64 per column warp
//   depth       rows of W (along k) in a stage: the tile that partitions count
//   depth_groups  each takes every depth_groups-th tile and has a ring of stages of its own
struct CtaShape {
  int rows;
  int row_warps;
  int column_warps;
  int depth;
  int depth_groups;
  int stages;

  constexpr int columns() const { return 64 * column_warps; }
  constexpr int group_warps() const { return row_warps * column_warps; }
  constexpr int group_threads() const { return 32 * group_warps(); }
  constexpr int threads() const { return group_threads() * depth_groups; }
  constexpr int rows_per_warp() const { return rows / row_warps; }
  constexpr bool operator==(const CtaShape&) const = default;
};

struct NamedShape {
  std::string_view name;  // rows x columns x depth x depth groups
  CtaShape shape;
  bool spills_on_8x = false;  // a few registers, in the main loop (tests read it off the binaries)
};

// kernel/instances/ compiles each of these; dispatch/select.cpp chooses among them.
inline constexpr std::array kSm80Shapes{
    NamedShape{"8x256x64x4", {8, 1, 4, 64, 4, 3}},
    NamedShape{"8x256x128x4", {8, 1, 4, 128, 4, 2}},
    NamedShape{"8x128x64x4", {8, 1, 2, 64, 4, 4}},
    NamedShape{"16x256x64x4", {16, 1, 4, 64, 4, 3}},
    NamedShape{"16x256x128x4", {16, 1, 4, 128, 4, 2}, true},
    NamedShape{"16x256x64x2", {16, 1, 4, 64, 2, 3}},
    NamedShape{"16x128x64x4", {16, 1, 2, 64, 4, 4}},
    NamedShape{"32x256x64x2", {32, 1, 4, 64, 2, 3}},
    NamedShape{"32x256x128x2", {32, 1, 4, 128, 2, 3}, true},
    NamedShape{"32x128x64x4", {32, 1, 2, 64, 4, 3}},
    NamedShape{"64x128x64x2", {64, 2, 2, 64, 2, 3}},
    NamedShape{"64x256x64x2", {64, 1, 4, 64, 2, 4}, true},
    NamedShape{"64x256x128x2", {64, 1, 4, 128, 2, 3}, true},
    NamedShape{"128x256x64x1", {128, 2, 4, 64, 1, 3}, true},
    NamedShape{"128x256x128x1", {128, 2, 4, 128, 1, 3}, true},
};

constexpr size_t sm80_index(std::string_view name) {
  size_t index = 0;
  while (index < kSm80Shapes.size() && kSm80Shapes[index].name != name) ++index;
  return index;  // the number of shapes if there is none of this name
}

struct KernelConfig {
  size_t shape = 0;  // index into kSm80Shapes
  int runs = 1;      // CTAs, each with an equal share of the tiles (core/partition.h)

  constexpr bool operator==(const KernelConfig&) const = default;
};

}  // namespace marlin
