#include "dispatch/select_sm90.h"

#include <algorithm>
#include <cmath>

#include "dispatch/select.h"

namespace marlin {
namespace {

// What was fastest for weights (k, n) and batches up to m, on a GPU with kTunedSms SMs. Where that was
// the net, the fastest shape of the engine follows: not every problem can take the net.
struct TunedRow {
  int64_t k;
  int64_t n;
  int64_t m;
  std::string_view shape;  // or kDenseName
  int runs;                // or slices

  constexpr bool dense() const { return shape == kDenseName; }
};

constexpr int kTunedSms = 132;
constexpr TunedRow kTuned[] = {
#include "dispatch/sm90_table.def"
};

constexpr bool every_shape_exists() {
  for (const TunedRow& row : kTuned)
    if (!row.dense() && sm90_index(row.shape) == kSm90Shapes.size()) return false;
  return true;
}
static_assert(every_shape_exists());

// How far apart two weights are: factors between their sides. A side counts in either direction.
double distance(const TunedRow& row, const Problem& problem) {
  const auto factor = [](int64_t a, int64_t b) {
    return std::abs(std::log2(static_cast<double>(a) / static_cast<double>(b)));
  };
  return factor(row.k, problem.k) + factor(row.n, problem.n);
}

// The batch size whose rows hold this problem: the next one that was measured.
int64_t tuned_batch(int64_t m) {
  int64_t next = 0, largest = 0;
  for (const TunedRow& row : kTuned) {
    largest = std::max(largest, row.m);
    if (row.m >= m && (next == 0 || row.m < next)) next = row.m;
  }
  return next == 0 ? largest : next;
}

// The first of the nearest rows that the problem can take.
const TunedRow& nearest(const Problem& problem) {
  const int64_t batch = tuned_batch(problem.m);
  const TunedRow* best = nullptr;
  for (const TunedRow& row : kTuned) {
    if (row.m != batch || (row.dense() && !dense_holds_any_scales(problem))) continue;
    if (best == nullptr || distance(row, problem) < distance(*best, problem)) best = &row;
  }
  return *best;
}

}  // namespace

KernelConfig select_sm90(const Problem& problem, const Device& device) {
  const TunedRow& row = nearest(problem);
  const bool same_weight = row.k == problem.k && row.n == problem.n;
  if (row.dense())
    return {Engine::kDense, 0, same_weight ? row.runs : dense_slices_by_rule(problem)};
  KernelConfig config{Engine::kSm90, sm90_index(row.shape)};
  Problem tuned = problem;
  tuned.m = row.m;
  const bool as_measured = same_weight && device.sm_count == kTunedSms &&
                           row_tiles(tuned, config) == row_tiles(problem, config);
  config.runs = as_measured ? row.runs : runs_by_rule(problem, config, device);
  return config;
}

}  // namespace marlin
