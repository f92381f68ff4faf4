#include "dispatch/select.h"

#include <algorithm>
#include <charconv>

#include "format/weight_words.h"
#include "format/shared_memory.h"

namespace marlin {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool fits(size_t shape, const Device& device) {
  return static_cast<int64_t>(kSm80SharedBytes[shape]) <= device.shared_bytes_per_block;
}

// One CTA per SM, each with an equal share.
int default_runs(const Problem& problem, size_t shape, const Device& device) {
  const int64_t tiles = partition_of(problem, {shape, 1}).tiles();
  return static_cast<int>(std::clamp<int64_t>(tiles, 1, device.sm_count));
}

}  // namespace

int64_t row_tiles(const Problem& problem, const KernelConfig& config) {
  return std::max<int64_t>(1, ceil_div(problem.m, kSm80Shapes[config.shape].shape.rows));
}

Partition partition_of(const Problem& problem, const KernelConfig& config) {
  const CtaShape& shape = kSm80Shapes[config.shape].shape;
  return {ceil_div(problem.n, shape.columns()) * row_tiles(problem, config),
          static_cast<int>(ceil_div(problem.k, shape.depth)), config.runs};
}

KernelConfig select_sm80(const Problem& problem, const Device& device) {
  const std::string_view wanted = problem.m <= 8    ? "8x256x64x4"
                                  : problem.m <= 16 ? "16x256x64x4"
                                  : problem.m <= 32 ? "32x256x64x2"
                                                    : "64x256x64x2";
  size_t shape = sm80_index(wanted);
  if (!fits(shape, device)) shape = sm80_index("16x256x64x2");
  return {shape, default_runs(problem, shape, device)};
}

std::optional<KernelConfig> parse_config(std::string_view name, const Problem& problem,
                                         const Device& device) {
  const size_t at = name.find('@');
  const size_t shape = sm80_index(name.substr(0, at));
  if (shape == kSm80Shapes.size() || !fits(shape, device)) return std::nullopt;
  KernelConfig config{shape, default_runs(problem, shape, device)};
  if (at == std::string_view::npos) return config;
  const std::string_view digits = name.substr(at + 1);
  const auto [end, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), config.runs);
  const int64_t tiles = partition_of(problem, {shape, 1}).tiles();
  if (error != std::errc{} || end != digits.data() + digits.size() || config.runs < 1 ||
      config.runs > tiles)
    return std::nullopt;
  return config;
}

std::string config_name(const KernelConfig& config) {
  return std::string(kSm80Shapes[config.shape].name) + "@" + std::to_string(config.runs);
}

}  // namespace marlin
