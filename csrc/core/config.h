// Kernel configurations: what selection returns, launch takes, and tests ask for by name.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
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
  // Scales multiply sums, in FP32, or where a warp has too many of those, weights, in 16 bits.
  constexpr bool scales_sums() const { return rows_per_warp() <= 32; }
  // How sums of depth groups and of CTAs come together: in registers, which is for two groups that swap
  // halves (epilogue/finish_tall.cuh), or in shared memory, as those of one group do, which is 2 % faster
  // there (16384x16896, m = 512).
  constexpr bool adds_in_registers() const { return rows_per_warp() > 32 && depth_groups == 2; }
  constexpr bool operator==(const CtaShape&) const = default;
};

struct NamedShape {
  std::string_view name;  // rows x columns x depth x depth groups
  CtaShape shape;
};

// kernel/instances/ compiles each of these; dispatch/costs.cpp chooses among them.
inline constexpr std::array kSm80Shapes{
    NamedShape{"8x128x64x4", {8, 1, 2, 64, 4, 4}},
    NamedShape{"8x128x128x4", {8, 1, 2, 128, 4, 3}},
    NamedShape{"8x256x128x2", {8, 1, 4, 128, 2, 3}},
    NamedShape{"16x256x64x2", {16, 1, 4, 64, 2, 3}},
    NamedShape{"16x128x128x4", {16, 1, 2, 128, 4, 3}},
    NamedShape{"16x256x128x2", {16, 1, 4, 128, 2, 3}},
    NamedShape{"32x256x64x2", {32, 1, 4, 64, 2, 3}},
    NamedShape{"32x128x64x4", {32, 1, 2, 64, 4, 3}},
    NamedShape{"32x256x128x2", {32, 1, 4, 128, 2, 3}},
    NamedShape{"48x256x128x2", {48, 1, 4, 128, 2, 2}},
    NamedShape{"64x128x64x2", {64, 2, 2, 64, 2, 3}},
    NamedShape{"64x128x64x4", {64, 1, 2, 64, 4, 3}},
    NamedShape{"64x256x128x1", {64, 2, 4, 128, 1, 2}},
    NamedShape{"64x256x128x2", {64, 1, 4, 128, 2, 2}},
    NamedShape{"96x256x128x1", {96, 2, 4, 128, 1, 2}},
    NamedShape{"128x256x64x1", {128, 2, 4, 64, 1, 3}},
    NamedShape{"128x256x128x1", {128, 2, 4, 128, 1, 3}},
};

constexpr size_t sm80_index(std::string_view name) {
  size_t index = 0;
  while (index < kSm80Shapes.size() && kSm80Shapes[index].name != name) ++index;
  return index;  // the number of shapes if there is none of this name
}

// The shape of a CTA of the sm_90 engine: consumer warpgroups, and one more that feeds them.
//   rows      of X
//   columns   of W
//   depth     rows of W in a stage: the tile that partitions count
//   sets      of consumer warpgroups; each takes every sets-th stage
//   blocks    of 16 columns that a warp works on
//   twins     CTAs side by side, a cluster, that work on the same rows and share each copy of X
//
// With mma.sync a set is one warpgroup, which shares out a stage of 128 x 256 weights or the like:
// a warp takes 128 rows of 64 columns. With wgmma a set is as many warpgroups as it takes to span the
// columns, each with all rows of the stage.
struct Sm90Shape {
  bool wgmma;
  int rows;
  int columns;
  int depth;
  int sets;
  int blocks;
  int stages;
  int twins = 1;

  constexpr int set_warpgroups() const { return wgmma ? columns / (64 * blocks) : 1; }
  constexpr int consumers() const { return sets * set_warpgroups(); }  // warpgroups
  constexpr int threads() const { return 128 * (consumers() + 1); }
  // Warps of a set that work on the same columns, at different depths.
  constexpr int parts() const { return wgmma ? 1 : depth / 128; }
  // Who finish a slice's columns: with wgmma each warpgroup its own, else all together.
  constexpr int teams() const { return wgmma ? set_warpgroups() : 1; }
  // And of all twins together.
  constexpr int all_teams() const { return twins * teams(); }
  constexpr int team_threads() const { return wgmma ? 128 : 128 * consumers(); }
  // Scales multiply sums, in FP32, or with wgmma, which has no time for that, weights, in 16 bits.
  constexpr bool scales_sums() const { return !wgmma; }
  // Whether two CTAs that share a slice can add its sums over distributed shared memory. (With wgmma
  // each finishes half of the rows, and they are stored sixteen at a time.)
  constexpr bool can_pair() const { return twins == 1 && (!wgmma || rows % 32 == 0); }
  constexpr bool operator==(const Sm90Shape&) const = default;
};

struct NamedSm90Shape {
  // h, rows x columns x depth x consumer warpgroups; hh: twins, counted together
  std::string_view name;
  Sm90Shape shape;
};

inline constexpr std::array kSm90Shapes{
    NamedSm90Shape{"h8x256x128x2", {false, 8, 256, 128, 2, 4, 8}},
    NamedSm90Shape{"h8x128x256x2", {false, 8, 128, 256, 2, 4, 8}},
    NamedSm90Shape{"h8x64x512x1", {false, 8, 64, 512, 1, 4, 4}},
    NamedSm90Shape{"h16x256x128x2", {false, 16, 256, 128, 2, 4, 8}},
    NamedSm90Shape{"h16x128x256x2", {false, 16, 128, 256, 2, 4, 6}},
    NamedSm90Shape{"h16x64x512x2", {false, 16, 64, 512, 2, 4, 4}},
    NamedSm90Shape{"h32x256x128x2", {true, 32, 256, 128, 2, 4, 6}},
    NamedSm90Shape{"h32x128x256x2", {true, 32, 128, 256, 2, 2, 6}},
    NamedSm90Shape{"h48x256x128x2", {true, 48, 256, 128, 2, 4, 4}},
    NamedSm90Shape{"h48x128x128x2", {true, 48, 128, 128, 1, 1, 8}},
    NamedSm90Shape{"h64x256x128x2", {true, 64, 256, 128, 2, 4, 4}},
    NamedSm90Shape{"h64x192x256x3", {true, 64, 192, 256, 1, 1, 3}},
    NamedSm90Shape{"h64x128x256x2", {true, 64, 128, 256, 1, 1, 4}},
    NamedSm90Shape{"h64x128x128x2", {true, 64, 128, 128, 1, 1, 8}},
    NamedSm90Shape{"h96x256x128x2", {true, 96, 256, 128, 1, 2, 4}},
    NamedSm90Shape{"h128x256x128x2", {true, 128, 256, 128, 1, 2, 4}},
    NamedSm90Shape{"h128x192x128x3", {true, 128, 192, 128, 1, 1, 4}},
    NamedSm90Shape{"h128x128x128x2", {true, 128, 128, 128, 1, 1, 5}},
    NamedSm90Shape{"h192x128x128x2", {true, 192, 128, 128, 1, 1, 3}},
    NamedSm90Shape{"h256x128x64x2", {true, 256, 128, 64, 1, 1, 5}},
    NamedSm90Shape{"hh256x256x64x4", {true, 256, 128, 64, 1, 1, 5, 2}},
};

constexpr size_t sm90_index(std::string_view name) {
  size_t index = 0;
  while (index < kSm90Shapes.size() && kSm90Shapes[index].name != name) ++index;
  return index;  // the number of shapes if there is none of this name
}

// kDense: dequantize, then the library's 16-bit product (torch/cuda_dense.h); it has no shapes.
enum class Engine : uint8_t { kSm80, kSm90, kDense };

struct KernelConfig {
  Engine engine = Engine::kSm80;
  size_t shape = 0;  // index into the engine's shapes
  int runs = 1;      // CTAs or twins, each with an equal share of the tiles (core/partition.h)

  constexpr bool operator==(const KernelConfig&) const = default;
};

// A shape by its name, of either engine; to be run once.
constexpr std::optional<KernelConfig> find_shape(std::string_view name) {
  if (const size_t index = sm80_index(name); index < kSm80Shapes.size())
    return KernelConfig{Engine::kSm80, index};
  if (const size_t index = sm90_index(name); index < kSm90Shapes.size())
    return KernelConfig{Engine::kSm90, index};
  return std::nullopt;
}

// CTAs of a run.
constexpr int ctas_of_run(const KernelConfig& config) {
  return config.engine == Engine::kSm90 ? kSm90Shapes[config.shape].shape.twins : 1;
}

// What partitions are made of: a slice is `columns` wide and `rows` high, a tile `depth` deep.
struct TileShape {
  int rows;
  int columns;
  int depth;
};

constexpr TileShape tile_shape(const KernelConfig& config) {
  if (config.engine == Engine::kSm80) {
    const CtaShape& shape = kSm80Shapes[config.shape].shape;
    return {shape.rows, shape.columns(), shape.depth};
  }
  const Sm90Shape& shape = kSm90Shapes[config.shape].shape;
  return {shape.rows, shape.columns * shape.twins, shape.depth};
}

// Whether scales multiply sums, in FP32, not weights.
constexpr bool scales_sums(const KernelConfig& config) {
  return config.engine == Engine::kSm80 ? kSm80Shapes[config.shape].shape.scales_sums()
                                        : kSm90Shapes[config.shape].shape.scales_sums();
}

constexpr std::string_view shape_name(const KernelConfig& config) {
  return config.engine == Engine::kSm80 ? kSm80Shapes[config.shape].name
                                        : kSm90Shapes[config.shape].name;
}

}  // namespace marlin
