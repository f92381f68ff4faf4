#include "dispatch/select.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <span>

#include "dispatch/select_sm90.h"
#include "format/shared_memory.h"
#include "format/weight_words.h"

namespace marlin {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t kDenseTileStrips = 256 / kTileColumns;  // of cuBLAS, at its widest
// Rows of X that CTAs read together: with 132 tiles of 256 x 128 at a time, as many bytes of X come from
// memory as of W. (H200, 8192x8192, 4096 rows: 737 us; in one group of all rows 814.)
constexpr int kRasterRows = 1024;
constexpr int64_t kAny = std::numeric_limits<int64_t>::max();

// The sm_80 engine, up to 32 rows, and up to 512 for small weights: a row holds for batches and weights
// up to these sizes that no row above it holds for. Of its shapes the first that fits is taken, the
// second where a block has 99 KB of shared memory, not 163, or scales must multiply sums. What follows a
// row is why it is there: us on an H200, which stands in for cards of 8.x (bench/LOG.md), group 128,
// FP16, 2026-11-21.
struct Row {
  int64_t rows;     // m
  int64_t weights;  // k · n
  std::array<std::string_view, 2> shapes;
};

constexpr int64_t kMi = 1 << 20;
constexpr std::array kTable{
    Row{8, 46 * kMi, {"8x128x128x4", "8x128x64x4"}},     // 4096x4096: 7.8; 8x256x128x2 8.4
    Row{8, kAny, {"8x256x128x2", "8x128x64x4"}},         // 4096x22016: 17.4; 8x128x128x4 18.3
    Row{16, 46 * kMi, {"16x128x128x4", "16x256x64x2"}},  // 4096x4096: 8.7; 16x256x128x2 9.6
    Row{16, kAny, {"16x256x128x2", "16x256x64x2"}},      // 4096x22016: 20.1; 16x128x128x4 21.4
    Row{32, 8 * kMi, {"16x128x128x4", "32x256x64x2"}},   // 4096x1024: 7.5; 32x128x64x4 10.2
    Row{32, 46 * kMi, {"32x128x64x4", "32x256x64x2"}},   // 4096x6144: 13.9; 32x256x128x2 14.7
    Row{32, kAny, {"32x256x128x2", "32x256x64x2"}},      // 8192x8192: 21.0; 32x128x64x4 23.5
    Row{48, 8 * kMi, {"32x128x64x4", "64x128x64x2"}},    // 4096x1024: 10.0; 32x256x128x2 13.0
    Row{48, 46 * kMi, {"32x256x128x2", "64x128x64x2"}},  // 4096x6144: 18.3; 64x128x64x4 19.0
    Row{64, 24 * kMi, {"32x128x64x4", "64x128x64x2"}},   // 4096x4096: 15.3; 64x128x64x4 16.0
    Row{64, 46 * kMi, {"64x128x64x4", "64x128x64x2"}},   // 11008x4096: 26.9; 32x128x64x4 29.0
    Row{96, 8 * kMi, {"64x128x64x4", "64x128x64x2"}},    // 4096x1024: 14.7; 48x256x128x2 19.2
    Row{96, 17 * kMi, {"48x256x128x2", "64x128x64x2"}},  // 4096x4096: 18.9; 64x128x64x4 22.2
    Row{256, 17 * kMi, {"64x128x64x4", "64x128x64x2"}},  // 4096x4096: 30.7; 64x256x128x2 33.2
    Row{512, 8 * kMi, {"64x128x64x4", "64x128x64x2"}},   // 4096x1024: 22.2; 64x256x128x2 22.9
};

// Beyond the table: tiles of 128 rows from 1024 on, where they fill the GPU and few of their rows are
// empty (8192x8192, m = 4096: 1412; 64x256x128x2 1450; but m = 512 177, 176), elsewhere the shape whose
// rows, also the empty ones of the last tile, cost least.
constexpr int64_t kManyRows = 1024;
constexpr std::array<std::string_view, 2> kFullShapes{"128x256x128x1", "128x256x64x1"};

struct TallShape {
  std::string_view name;
  int cost;  // of a row, percent of the cheapest shape's: 16384x16896, one or two tiles high
};

constexpr std::array kTallShapes{
    TallShape{"64x256x128x2", 100},   // m = 128: 172.8, 512: 678
    TallShape{"48x256x128x2", 110},   // m = 96: 142.3
    TallShape{"128x256x128x1", 108},  // m = 128: 186.7
    TallShape{"96x256x128x1", 116},   // m = 96: 156.2, 192: 288
    TallShape{"128x256x64x1", 119},   // m = 128: 205.4
    TallShape{"64x256x128x1", 126},   // m = 128: 217.2
};

bool fits(const KernelConfig& config, const Device& device) {
  return shared_bytes(config) <= device.shared_bytes_per_block;
}

// Whether the engine can do it. FP16 cannot hold BF16's scales, so they do not multiply weights in it.
bool runs_on(const KernelConfig& config, const Problem& problem, const Device& device) {
  if (config.engine == Engine::kDense) return dense_holds_scales(problem);
  const bool holds_scales = problem.per_column() || problem.activation == Dtype::kBF16 ||
                            problem.scale == Dtype::kF16 || scales_sums(config);
  return holds_scales && (config.engine == Engine::kSm80 || device.sm90_engine);
}

bool selectable(std::string_view name, const Problem& problem, const Device& device) {
  const KernelConfig config{Engine::kSm80, sm80_index(name)};
  return config.shape < kSm80Shapes.size() && fits(config, device) &&
         runs_on(config, problem, device);
}

constexpr std::string_view kSmallestShape = "16x256x64x2";

std::string_view first_that_fits(std::span<const std::string_view> shapes, const Problem& problem,
                                 const Device& device) {
  for (std::string_view name : shapes)
    if (selectable(name, problem, device)) return name;
  return kSmallestShape;
}

std::string_view cheapest_that_fits(const Problem& problem, const Device& device) {
  std::string_view best = kSmallestShape;
  int64_t best_cost = kAny;
  for (const TallShape& shape : kTallShapes) {
    const int64_t rows = kSm80Shapes[sm80_index(shape.name)].shape.rows;
    const int64_t cost = ceil_div(problem.m, rows) * rows * shape.cost;
    if (cost < best_cost && selectable(shape.name, problem, device)) {
      best = shape.name;
      best_cost = cost;
    }
  }
  return best;
}

std::string_view select_shape(const Problem& problem, const Device& device) {
  for (const Row& row : kTable)
    if (problem.m <= row.rows && problem.k * problem.n <= row.weights)
      return first_that_fits(row.shapes, problem, device);
  const int64_t tall_tiles = ceil_div(problem.m, 128);
  const bool fills = tall_tiles * ceil_div(problem.n, 256) * 100 >= int64_t{device.sm_count} * 84;
  const bool few_empty_rows = tall_tiles * 128 * 100 <= problem.m * 115;
  if (problem.m >= kManyRows && fills && few_empty_rows)
    for (std::string_view name : kFullShapes)
      if (selectable(name, problem, device)) return name;
  return cheapest_that_fits(problem, device);
}

std::optional<KernelConfig> find_shape(std::string_view name) {
  if (const size_t index = sm80_index(name); index < kSm80Shapes.size())
    return KernelConfig{Engine::kSm80, index};
  if (const size_t index = sm90_index(name); index < kSm90Shapes.size())
    return KernelConfig{Engine::kSm90, index};
  return std::nullopt;
}

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
  return select(problem, {8, 0, *sm_count, *bytes});
}

}  // namespace

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
  if (device.sm90_engine) {
    const KernelConfig config = select_sm90(problem, device);
    if (runs_on(config, problem, device)) return config;
    // FP16 rows with BF16 scales: the sm_80 engine scales sums, whatever the scales' size.
  }
  KernelConfig config{Engine::kSm80, sm80_index(select_shape(problem, device))};
  config.runs = runs_by_rule(problem, config, device);
  return config;
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
  if (!shape || !fits(*shape, device) || !runs_on(*shape, problem, device)) return std::nullopt;
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
