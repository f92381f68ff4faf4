// Kernel configurations: what selection returns, launch takes, and tests ask for by name.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/types.h"

namespace marlin {

// The shape of a CTA of the sm_80 engine. Its warps form depth_groups x row_warps x column_warps.
//   columns   64 per column warp
//   rows      of X, shared evenly by the row warps
//   depth     each depth group takes every depth_groups-th tile along k, with its own ring of stages
struct CtaShape {
  int rows;
  int row_warps;
  int column_warps;
  int depth_groups;
  int stages;

  constexpr int columns() const { return 64 * column_warps; }
  constexpr int group_warps() const { return row_warps * column_warps; }
  constexpr int group_threads() const { return 32 * group_warps(); }
  constexpr int threads() const { return group_threads() * depth_groups; }
  constexpr int rows_per_warp() const { return rows / row_warps; }
  constexpr bool operator==(const CtaShape&) const = default;
};

// Rows of W in a stage: the engine's tile along k.
inline constexpr int kStageRows = 64;

struct NamedShape {
  std::string_view name;  // rows x columns x depth groups
  CtaShape shape;
};

// kernel/instances/ compiles each of these; dispatch/select.cpp chooses among them.
inline constexpr std::array kSm80Shapes{
    NamedShape{"8x256x4", {8, 1, 4, 4, 3}},   NamedShape{"8x128x4", {8, 1, 2, 4, 4}},
    NamedShape{"16x256x4", {16, 1, 4, 4, 3}}, NamedShape{"16x256x2", {16, 1, 4, 2, 3}},
    NamedShape{"16x128x4", {16, 1, 2, 4, 4}}, NamedShape{"32x256x2", {32, 1, 4, 2, 4}},
    NamedShape{"32x128x4", {32, 1, 2, 4, 3}}, NamedShape{"64x256x1", {64, 2, 4, 1, 4}},
    NamedShape{"64x128x2", {64, 2, 2, 2, 3}}, NamedShape{"64x256x2", {64, 1, 4, 2, 4}},
    NamedShape{"128x256x1", {128, 2, 4, 1, 4}}, NamedShape{"128x128x1", {128, 4, 2, 1, 4}},
};

constexpr size_t sm80_index(std::string_view name) {
  size_t index = 0;
  while (index < kSm80Shapes.size() && kSm80Shapes[index].name != name) ++index;
  return index;  // the number of shapes if there is none of this name
}

// How often sums meet their scales: compiled apart, since it shapes the main loop.
enum class ScaleSteps {
  kOnce,       // per column: at the very end
  kStage,      // groups of 64 or 128 rows: after each stage
  kHalfStage,  // groups of 32 rows
};

struct KernelConfig {
  size_t shape = 0;  // index into kSm80Shapes
  int runs = 1;      // CTAs, each with an equal share of the tiles (core/partition.h)

  constexpr bool operator==(const KernelConfig&) const = default;
};

}  // namespace marlin
