// The order of a row of scales: which column the scale at a given position belongs to.
//
// Grouped, in each run of 64 columns:      position 8 i + j holds column i + 8 j.
// Per column, in each run of 32 columns:   position 8 i + j holds column 2 i + {0,1,8,9,16,17,24,25}[j].
//
// Both put next to each other what one lane of the published kernel's epilogue (or its mainloop,
// for groups) needs. A weight with a single group uses the per-column order, whatever its k.
#pragma once

#include <cstdint>

namespace marlin {

inline constexpr int kGroupedRun = 64;
inline constexpr int kPerColumnRun = 32;

constexpr int grouped_column(int position) { return position / 8 + 8 * (position % 8); }
constexpr int grouped_position(int column) { return 8 * (column % 8) + column / 8; }

constexpr int per_column_column(int position) {
  const int i = position / 8, j = position % 8;
  return 2 * i + 8 * (j / 2) + j % 2;
}
constexpr int per_column_position(int column) {
  return 8 * ((column % 8) / 2) + 2 * (column / 8) + column % 2;
}

// Where in its row (n scales) the scale of column `column` lies.
constexpr int64_t scale_position(int64_t column, bool per_column) {
  const int run = per_column ? kPerColumnRun : kGroupedRun;
  const int inside = static_cast<int>(column % run);
  return column - inside + (per_column ? per_column_position(inside) : grouped_position(inside));
}

constexpr bool orders_are_bijections() {
  for (int p = 0; p < kGroupedRun; ++p)
    if (grouped_position(grouped_column(p)) != p) return false;
  for (int p = 0; p < kPerColumnRun; ++p)
    if (per_column_position(per_column_column(p)) != p) return false;
  return true;
}
static_assert(orders_are_bijections());

}  // namespace marlin
