// What selection needs to know of a GPU.
#pragma once

namespace marlin {

struct Device {
  int major = 0;  // compute capability
  int minor = 0;
  int sm_count = 0;
  int shared_bytes_per_block = 0;  // with opt-in

  constexpr bool operator==(const Device&) const = default;
};

}  // namespace marlin
