// The GPUs of this machine, asked of the driver once each.
#pragma once

#include "core/device.h"

namespace marlin {

// Throws std::runtime_error if the driver does not answer.
const Device& device(int index);

}  // namespace marlin
