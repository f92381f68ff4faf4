// Selection for the sm_80 engine.
#pragma once

#include "core/config.h"
#include "core/device.h"
#include "core/types.h"

namespace marlin {

// What should cost least by what timings on an H200, which stands in for cards of 8.x, say together
// (sm80_costs.def).
KernelConfig select_sm80(const Problem& problem, const Device& device);

}  // namespace marlin
