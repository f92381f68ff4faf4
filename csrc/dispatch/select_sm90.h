// Selection for the sm_90 engine.
#pragma once

#include "core/config.h"
#include "core/device.h"
#include "core/types.h"

namespace marlin {

// From measurements (sm90_table.def): those of the shape itself, or of the nearest one.
KernelConfig select_sm90(const Problem& problem, const Device& device);

}  // namespace marlin
