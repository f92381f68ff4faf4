// What the compiler shall not work out again.
#pragma once

#include <cstdint>

namespace marlin::ptx {

// The value, from here on in a register: offsets that never change, for instance.
__device__ inline uint32_t in_a_register(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace marlin::ptx
