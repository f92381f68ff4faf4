// cp.async.bulk: copies of whole pieces by the copy engine, issued by one thread and counted, in
// bytes, by an mbarrier.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx/mbarrier.cuh"

namespace marlin::ptx {

// The L2 policy "evict first", for data that is read once: createpolicy's result is a constant.
inline constexpr uint64_t kEvictFirst = 0x12f0000000000000;

// Copies `bytes`, a multiple of 16, between 16-byte aligned places.
__device__ inline void bulk_copy(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(kEvictFirst)
      : "memory");
}

// Copies a box of a matrix that a tensor map describes; what lies outside the matrix becomes zero.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
__device__ inline void tensor_copy(void* shared, const CUtensorMap* map, int column, int row,
                                   Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same for data that is read once.
__device__ inline void tensor_copy_once(void* shared, const CUtensorMap* map, int column, int row,
                                        Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(kEvictFirst)
      : "memory");
}

// The same to several CTAs of the cluster, by the bits of `ranks`: to the same place, and counted by the
// same barrier, of each.
__device__ inline void tensor_multicast(void* shared, const CUtensorMap* map, int column, int row,
                                        Mbarrier* barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(ranks)
      : "memory");
}

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

}  // namespace marlin::ptx
