// lop3: any function of three bits, at each bit of three words.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#logic-and-shift-instructions-lop3
#pragma once

#include <cstdint>

namespace marlin::ptx {

// (a & kMask) | kBits in one instruction; left to itself the compiler takes two, one per constant.
template <uint32_t kMask, uint32_t kBits>
__device__ inline uint32_t and_or(uint32_t a) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "n"(kMask), "n"(kBits));
  return result;
}

}  // namespace marlin::ptx
