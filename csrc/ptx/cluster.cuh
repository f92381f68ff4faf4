// Clusters: CTAs that reach into each other's shared memory.
#pragma once

#include <cstdint>

#include "ptx/mbarrier.cuh"

namespace marlin::ptx {

// https://docs.nvidia.com/cuda/parallel-thread-execution/#special-registers-cluster-ctarank
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster arrives, goes on, and later waits for the others. Relaxed: it orders
// nothing but mbarriers that were initialized and fenced.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Writes to the same place in another CTA's shared memory, and counts the bytes on its barrier.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st-async
__device__ inline void store_remote(void* shared, Mbarrier* barrier, uint32_t rank, float4 value) {
  asm volatile(
      "{\n"
      ".reg .b32 place, counter;\n"
      "mapa.shared::cluster.u32 place, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[place], {%3, %4, %5, %6}, [counter];\n"
      "}\n" ::"r"(shared_address(shared)),
      "r"(shared_address(barrier)), "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z),
      "f"(value.w)
      : "memory");
}

// Arrives at another CTA's barrier. It says no more than that this CTA has what it wanted to read of its own
// shared memory: nothing else is ordered.
__device__ inline void mbarrier_signal_remote(Mbarrier* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// mbarrier_wait for arrivals from other CTAs: what they have seen is visible, too. An acquire of the
// cluster empties L1, so it comes once, when it is known to succeed.
__device__ inline void mbarrier_wait_remote(Mbarrier* barrier, uint32_t parity) {
  mbarrier_wait(barrier, parity);
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

}  // namespace marlin::ptx
