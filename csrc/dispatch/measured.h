// What was measured to run a problem fastest.
#pragma once

#include <optional>

#include "core/config.h"
#include "core/device.h"
#include "core/types.h"

namespace marlin {

// Of an H200 (sm90_table.def): what was fastest for this weight and the next larger batch that was
// measured, if it takes as many tiles of rows there and can run this problem.
std::optional<KernelConfig> measured(const Problem& problem, const Device& device);

}  // namespace marlin
