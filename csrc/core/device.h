// What selection needs to know of a GPU.
#pragma once

namespace marlin {

struct Device {
  int major = 0;  // compute capability
  int minor = 0;
  int sm_count = 0;
  int shared_bytes_per_block = 0;  // with opt-in
  bool sm90_engine = false;        // a Hopper GPU, and a build that has the engine for it

  constexpr bool operator==(const Device&) const = default;
};

}  // namespace marlin
