#include "dispatch/select_sm90.h"

#include <algorithm>
#include <limits>

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

// What any launch of a shape costs, in us: a part for the launch, for each tile that its busiest run works
// on, for each slice that this begins or ends in, and for each further run that shares the last of them.
struct CostRow {
  std::string_view shape;
  double launch, tile, segment, sharer;

  constexpr double us(const BusiestRun& run) const {
    return launch + tile * static_cast<double>(run.tiles) +
           segment * static_cast<double>(run.segments) + sharer * (run.sharers - 1);
  }
};

constexpr CostRow kCosts[] = {
#include "dispatch/sm90_costs.def"
};

constexpr bool every_shape_exists() {
  for (const TunedRow& row : kTuned)
    if (!row.dense() && sm90_index(row.shape) == kSm90Shapes.size()) return false;
  for (const CostRow& row : kCosts)
    if (sm90_index(row.shape) == kSm90Shapes.size()) return false;
  return true;
}
static_assert(every_shape_exists());

// The batch size whose rows hold this problem: the next one that was measured.
int64_t tuned_batch(int64_t m) {
  int64_t next = 0, largest = 0;
  for (const TunedRow& row : kTuned) {
    largest = std::max(largest, row.m);
    if (row.m >= m && (next == 0 || row.m < next)) next = row.m;
  }
  return next == 0 ? largest : next;
}

// The first row that was measured with this weight and that the problem can take, or nullptr.
const TunedRow* measured(const Problem& problem) {
  const int64_t batch = tuned_batch(problem.m);
  for (const TunedRow& row : kTuned)
    if (row.k == problem.k && row.n == problem.n && row.m == batch &&
        (!row.dense() || dense_holds_any_scales(problem)))
      return &row;
  return nullptr;
}

// Of all shapes, each in even splits of its slices, in whole waves of them, and with a run for every SM.
KernelConfig cheapest(const Problem& problem, const Device& device) {
  KernelConfig best;
  double least = std::numeric_limits<double>::infinity();
  for (const CostRow& row : kCosts) {
    KernelConfig config{Engine::kSm90, sm90_index(row.shape)};
    const int64_t at_once = device.sm_count / ctas_of_run(config);
    if (at_once == 0) continue;
    const Partition whole = partition_of(problem, config);
    const int64_t most = std::clamp<int64_t>(whole.tiles(), 1, at_once);
    const auto consider = [&](int64_t runs) {
      if (runs > most) return;
      config.runs = static_cast<int>(runs);
      const double us = row.us(busiest_run(partition_of(problem, config)));
      if (us >= least) return;
      least = us;
      best = config;
    };
    consider(most);
    for (int split : {1, 2, 3, 4, 6, 8}) consider(whole.slices * split);
    const int64_t waves = (whole.slices + most - 1) / most;
    consider((whole.slices + waves - 1) / waves);
  }
  return best;
}

}  // namespace

KernelConfig select_sm90(const Problem& problem, const Device& device) {
  const TunedRow* row = device.sm_count == kTunedSms ? measured(problem) : nullptr;
  if (row == nullptr) return cheapest(problem, device);
  if (row->dense()) return {Engine::kDense, 0, row->runs};
  const KernelConfig config{Engine::kSm90, sm90_index(row->shape), row->runs};
  Problem tuned = problem;
  tuned.m = row->m;
  const bool as_measured = row_tiles(tuned, config) == row_tiles(problem, config);
  return as_measured ? config : cheapest(problem, device);
}

}  // namespace marlin
