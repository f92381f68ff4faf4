// What should run a problem fastest, by what launches of each shape cost.
#pragma once

#include "core/config.h"
#include "core/device.h"
#include "core/types.h"

namespace marlin {

// Of the shapes that can run the problem on this device the one that costs least, each in even splits of
// its slices, in whole waves of them, and with a run for every SM. If none can, a configuration that
// cannot either.
KernelConfig cheapest(const Problem& problem, const Device& device);

}  // namespace marlin
