// Programmatic dependent launch: a kernel may start while the one before it in the stream drains.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
#pragma once

namespace marlin::ptx {

// Waits until every kernel before this one is complete and its writes can be seen.
__device__ inline void wait_for_predecessors() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel start once all CTAs have called this or are gone.
__device__ inline void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace marlin::ptx
