// Selection for the sm_90 engine.
#pragma once

#include <optional>

#include "core/config.h"
#include "core/device.h"
#include "core/types.h"

namespace marlin {

// What was measured for this weight (sm90_table.def), or else what should cost least by what the
// measurements of all weights say together (sm90_costs.def). Nothing if no shape can run it.
std::optional<KernelConfig> select_sm90(const Problem& problem, const Device& device);

}  // namespace marlin
