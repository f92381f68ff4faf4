// stmatrix: four 8x8 matrices of 16-bit elements from fragment layout to shared memory, transposed.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
#pragma once

#include <cstdint>

#include "ptx/shared_address.cuh"

namespace marlin::ptx {

// Lane 8 i + r gives the address of row r of the transposed matrix i, which register i holds.
__device__ inline void stmatrix_transposed(void* row, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   shared_address(row)),
               "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
               : "memory");
}

}  // namespace marlin::ptx
