#include "dispatch/costs.h"

#include <algorithm>
#include <limits>

#include "dispatch/select.h"

namespace marlin {

std::optional<KernelConfig> cheapest(std::span<const CostRow> costs, const Problem& problem,
                                     const Device& device) {
  std::optional<KernelConfig> best;
  double least = std::numeric_limits<double>::infinity();
  for (const CostRow& row : costs) {
    KernelConfig config = *find_shape(row.shape);
    const int64_t at_once = device.sm_count / ctas_of_run(config);
    if (at_once == 0 || !can_run(config, problem, device)) continue;
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

}  // namespace marlin
