// The 32-bit address by which instructions name shared memory.
#pragma once

#include <cstdint>

namespace marlin::ptx {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace marlin::ptx
