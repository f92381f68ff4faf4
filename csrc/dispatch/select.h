// Which configuration runs a problem on a device: pure functions, the same on every machine.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "core/config.h"
#include "core/device.h"
#include "core/partition.h"
#include "core/raster.h"
#include "core/types.h"

namespace marlin {

inline constexpr std::string_view kDenseName = "dense";

KernelConfig select(const Problem& problem, const Device& device);

// The same, remembered by each thread for the problems it met last: a table takes a microsecond to
// search, the model of costs three. `device` must outlive the thread.
KernelConfig select_again(const Problem& problem, const Device& device);

// Whether 16-bit weights can take the scales. FP16 has no room for BF16's, so these multiply sums.
constexpr bool weights_hold_scales(const Problem& problem) {
  return problem.per_column() || problem.activation == Dtype::kBF16 || problem.scale == Dtype::kF16;
}

// Whether a configuration fits the device and holds the problem's scales.
bool can_run(const KernelConfig& config, const Problem& problem, const Device& device);

// One CTA per SM with an equal share of the tiles; or so many runs that they end where slices do, where
// that leaves at most a sixth of the SMs idle (sm_80 engine, 8192x8192, m = 1: 14.2 us with 128 runs,
// 14.9 with 132). With more slices than SMs only what is left after whole slices is shared, so on Hopper
// a tenth (8192x57344, m = 32: 112 runs 88 us, 132 81; 4096x12288, m = 512: 128 runs 70 us, 132 74).
int runs_by_rule(const Problem& problem, const KernelConfig& config, const Device& device);

// The net takes as few slices as keep each within so many bytes of 16-bit weights, and its columns whole
// tiles of cuBLAS where it has that many. (On an H200, times FP16, in 1, 2, 4, 8 slices: 8192x8192,
// m = 4096: 0.84, 0.87, 0.87, 0.84, by this rule 0.89; 4096x4096, m = 8192: 0.88 in one, as here.)
inline constexpr int64_t kDenseSliceBytes = int64_t{64} << 20;
int dense_slices_by_rule(const Problem& problem);
int64_t dense_slice_strips(const Problem& problem, int slices);

// Whether the net is exact enough for scales of ordinary size: FP16 weights cannot hold what BF16
// scales can.
constexpr bool dense_holds_scales(const Problem& problem) {
  return problem.activation != Dtype::kF16 || problem.scale == Dtype::kF16;
}

// And for any scales: FP16 weights overflow from scales of 8192 on, with zero points of 4095.
constexpr bool dense_holds_any_scales(const Problem& problem) {
  return problem.activation == Dtype::kBF16;
}

// "dense", or "dense@3" in so many slices; "16x256x64x2", or "16x256x64x2@96" with the number of
// runs; or "like:108:166912", whatever is selected on an 8.x GPU with so many SMs and bytes of
// shared memory per block. Nothing if there is no such shape, it does not fit the device or the
// problem, or the runs (slices) are not between 1 and the problem's tiles or kMostRuns (strips).
std::optional<KernelConfig> parse_config(std::string_view name, const Problem& problem,
                                         const Device& device);
std::string config_name(const KernelConfig& config);  // "16x256x64x2@96"

int64_t row_tiles(const Problem& problem, const KernelConfig& config);
Partition partition_of(const Problem& problem, const KernelConfig& config);
Raster raster_of(const Problem& problem, const KernelConfig& config);

// Whether two runs share every slice, and their CTAs can add their sums without global memory.
constexpr bool in_pairs(const KernelConfig& config, const Partition& partition) {
  return config.engine == Engine::kSm90 && kSm90Shapes[config.shape].shape.can_pair() &&
         partition.runs == 2 * partition.slices;
}

// Whether any two runs touch the same slice.
constexpr bool shares_slices(const Partition& partition) {
  return partition.slices % partition.runs != 0;
}

}  // namespace marlin
