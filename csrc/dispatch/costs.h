// What launches cost, and which configuration should cost least: for weights that nobody measured.
#pragma once

#include <optional>
#include <span>
#include <string_view>

#include "core/config.h"
#include "core/device.h"
#include "core/partition.h"
#include "core/types.h"

namespace marlin {

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

// Of the shapes that can run the problem, each in even splits of its slices, in whole waves of them, and
// with a run for every SM. Nothing if none can.
std::optional<KernelConfig> cheapest(std::span<const CostRow> costs, const Problem& problem,
                                     const Device& device);

}  // namespace marlin
