#include "dispatch/costs.h"

#include <algorithm>
#include <limits>

#include "core/partition.h"
#include "dispatch/select.h"

namespace marlin {
namespace {

// What any launch of a shape costs, in us: a part for the launch, for each tile that its busiest run works
// on, for each slice that this begins or ends in, and for each further run that shares the last of them.
struct CostRow {
  KernelConfig shape;
  double launch, tile, segment, sharer;

  constexpr CostRow(std::string_view name, double launch, double tile, double segment,
                    double sharer)
      : shape(find_shape(name).value()),  // no constant if there is none of this name
        launch(launch),
        tile(tile),
        segment(segment),
        sharer(sharer) {}

  constexpr double us(const BusiestRun& run) const {
    return launch + tile * static_cast<double>(run.tiles) +
           segment * static_cast<double>(run.segments) + sharer * (run.sharers - 1);
  }
};

// Of both engines on an H200, which stands in for cards of 8.x.
constexpr CostRow kCosts[] = {
#include "dispatch/sm80_costs.def"
#include "dispatch/sm90_costs.def"
};

// Whether a shape comes into question: on Hopper those of its own engine, but where scales have to multiply
// sums, which its larger shapes do not do, the sm_80 engine's, too.
bool considered(const KernelConfig& config, const Problem& problem, const Device& device) {
  const bool own = (config.engine == Engine::kSm90) == device.sm90_engine;
  return (own || !weights_hold_scales(problem)) && can_run(config, problem, device);
}

}  // namespace

KernelConfig cheapest(const Problem& problem, const Device& device) {
  KernelConfig best;
  double least = std::numeric_limits<double>::infinity();
  for (const CostRow& row : kCosts) {
    KernelConfig config = row.shape;
    const int64_t at_once = device.sm_count / ctas_of_run(config);
    if (at_once == 0 || !considered(config, problem, device)) continue;
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
