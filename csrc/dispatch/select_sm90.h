// Selection for the sm_90 engine.
#pragma once

#include "core/config.h"
#include "core/device.h"
#include "core/types.h"

namespace marlin {

// From measurements (sm90_table.inl): those of the shape itself, or of the nearest one.
KernelConfig select_sm90(const Problem& problem, const Device& device);

// As many runs as there is room for CTAs, each with an equal share of the tiles; or so many that runs
// end where slices do, where that leaves at most a sixth of the SMs idle.
int runs_by_rule(const Problem& problem, const KernelConfig& config, const Device& device);

}  // namespace marlin
