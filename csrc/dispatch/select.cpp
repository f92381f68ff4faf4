#include "dispatch/select.h"

#include <algorithm>
#include <array>
#include <charconv>

#include "dispatch/costs.h"
#include "dispatch/measured.h"
#include "format/shared_memory.h"
#include "format/weight_words.h"

namespace marlin {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t kDenseTileStrips = 256 / kTileColumns;  // of cuBLAS, at its widest
// Rows of X that CTAs read together: with 132 tiles of 256 x 128 at a time, as many bytes of X come from
// memory as of W. (H200, 8192x8192, 4096 rows: 737 us; in one group of all rows 814.)
constexpr int kRasterRows = 1024;

std::optional<int> parse_number(std::string_view digits) {
  int value = 0;
  const char* last = digits.data() + digits.size();
  const auto [end, error] = std::from_chars(digits.data(), last, value);
  if (error != std::errc{} || end != last) return std::nullopt;
  return value;
}

// The rest of "like:108:166912", on a device that must itself have that much shared memory.
std::optional<KernelConfig> select_like(std::string_view limits, const Problem& problem,
                                        const Device& device) {
  const size_t colon = limits.find(':');
  if (colon == std::string_view::npos) return std::nullopt;
  const auto sm_count = parse_number(limits.substr(0, colon));
  const auto bytes = parse_number(limits.substr(colon + 1));
  if (!sm_count || !bytes || *sm_count < 1 || *bytes > device.shared_bytes_per_block)
    return std::nullopt;
  const Device other{8, 0, *sm_count, *bytes};
  const KernelConfig config = select(problem, other);
  if (!can_run(config, problem, other)) return std::nullopt;
  return config;
}

}  // namespace

bool can_run(const KernelConfig& config, const Problem& problem, const Device& device) {
  if (config.engine == Engine::kDense) return dense_holds_scales(problem);
  return (weights_hold_scales(problem) || scales_sums(config)) &&
         (config.engine == Engine::kSm80 || device.sm90_engine) &&
         shared_bytes(config) <= device.shared_bytes_per_block;
}

int64_t row_tiles(const Problem& problem, const KernelConfig& config) {
  return std::max<int64_t>(1, ceil_div(problem.m, tile_shape(config).rows));
}

Partition partition_of(const Problem& problem, const KernelConfig& config) {
  const TileShape tile = tile_shape(config);
  return {ceil_div(problem.n, tile.columns) * row_tiles(problem, config),
          static_cast<int>(ceil_div(problem.k, tile.depth)), config.runs};
}

Raster raster_of(const Problem& problem, const KernelConfig& config) {
  const TileShape tile = tile_shape(config);
  const int64_t group = std::max(1, kRasterRows / tile.rows);
  return {static_cast<uint32_t>(row_tiles(problem, config)),
          static_cast<uint32_t>(ceil_div(problem.n, tile.columns)), static_cast<uint32_t>(group)};
}

int runs_by_rule(const Problem& problem, const KernelConfig& config, const Device& device) {
  const Partition whole = partition_of(problem, config);
  const int64_t ctas = std::max(1, device.sm_count / ctas_of_run(config));  // or twins
  auto fills = [&](int64_t runs, int percent) { return runs * 100 >= ctas * percent; };
  if (whole.slices <= ctas) {
    const int64_t even = ctas / whole.slices * whole.slices;
    if (fills(even, 84) && even <= whole.tiles()) return static_cast<int>(even);
  } else {
    const int64_t waves = (whole.slices + ctas - 1) / ctas;
    const int64_t even = (whole.slices + waves - 1) / waves;
    if (config.engine == Engine::kSm90 && fills(even, 90)) return static_cast<int>(even);
  }
  return static_cast<int>(std::min<int64_t>(whole.tiles(), ctas));
}

int dense_slices_by_rule(const Problem& problem) {
  const int64_t strips = problem.n / kTileColumns;
  const int64_t strip_bytes = problem.k * kTileColumns * size_bytes(problem.activation);
  const int64_t most = std::clamp<int64_t>(kDenseSliceBytes / strip_bytes, 1, strips);
  const int64_t whole_tiles = most / kDenseTileStrips * kDenseTileStrips;
  return static_cast<int>(
      ceil_div(strips, most == strips || whole_tiles == 0 ? most : whole_tiles));
}

int64_t dense_slice_strips(const Problem& problem, int slices) {
  const int64_t strips = problem.n / kTileColumns, even = ceil_div(strips, slices);
  if (even < kDenseTileStrips) return even;
  return std::min(strips, ceil_div(even, kDenseTileStrips) * kDenseTileStrips);
}

KernelConfig select(const Problem& problem, const Device& device) {
  const auto config = measured(problem, device);
  return config ? *config : cheapest(problem, device);
}

KernelConfig select_again(const Problem& problem, const Device& device) {
  struct Entry {
    const Device* device = nullptr;
    Problem problem;
    KernelConfig config;
  };
  constexpr size_t kEntries = 256;
  static thread_local std::array<Entry, kEntries> entries;
  const auto mixed = static_cast<uint64_t>(problem.m * 31 + problem.n / 64) * 31 +
                     static_cast<uint64_t>(problem.k / 16);
  Entry& entry = entries[mixed * 0x9e3779b97f4a7c15 >> 56];
  if (entry.device != &device || !(entry.problem == problem))
    entry = {&device, problem, select(problem, device)};
  return entry.config;
}

std::optional<KernelConfig> parse_config(std::string_view name, const Problem& problem,
                                         const Device& device) {
  constexpr std::string_view kLike = "like:";
  if (name.starts_with(kLike)) return select_like(name.substr(kLike.size()), problem, device);
  const size_t at = name.find('@');
  if (name.substr(0, at) == kDenseName) {
    const int slices = dense_slices_by_rule(problem);
    if (at == std::string_view::npos) return KernelConfig{Engine::kDense, 0, slices};
    const auto asked = parse_number(name.substr(at + 1));
    if (!asked || *asked < 1 || *asked > problem.n / kTileColumns) return std::nullopt;
    return KernelConfig{Engine::kDense, 0, *asked};
  }
  const auto shape = find_shape(name.substr(0, at));
  if (!shape || !can_run(*shape, problem, device)) return std::nullopt;
  KernelConfig config = *shape;
  config.runs = runs_by_rule(problem, config, device);
  if (at == std::string_view::npos) return config;
  const auto runs = parse_number(name.substr(at + 1));
  const int64_t most = std::min<int64_t>(partition_of(problem, config).tiles(), kMostRuns);
  if (!runs || *runs < 1 || *runs > most) return std::nullopt;
  config.runs = *runs;
  return config;
}

std::string config_name(const KernelConfig& config) {
  const std::string_view shape = config.engine == Engine::kDense ? kDenseName : shape_name(config);
  return std::string(shape) + "@" + std::to_string(config.runs);
}

}  // namespace marlin
