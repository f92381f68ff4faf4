// What selection and checks need to know of a GPU, asked of the driver once per device.
#pragma once

namespace marlin {

struct Device {
  int major = 0;  // compute capability
  int minor = 0;
  int sm_count = 0;
  int shared_bytes_per_block = 0;  // with opt-in

  constexpr int capability() const { return 10 * major + minor; }
  constexpr bool operator==(const Device&) const = default;
};

// Throws std::runtime_error if the driver does not answer.
const Device& device(int index);

}  // namespace marlin
