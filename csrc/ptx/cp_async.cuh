// cp.async: 16-byte copies from global to shared memory that complete in the background.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async
#pragma once

#include "ptx/shared_address.cuh"

namespace marlin::ptx {

// Copies 16 bytes, past L1. Where `valid` is false, writes zeros and reads nothing.
//
// No L2 eviction hint: with nvcc 13.0 the cache-policy operand of cp.async assembles into an illegal
// instruction.
__device__ inline void cp_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's committed groups are still under way.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace marlin::ptx
