// ldmatrix: four 8x8 matrices of 16-bit elements from shared memory into fragment layout.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
#pragma once

#include <cstdint>

#include "ptx/shared_address.cuh"

namespace marlin::ptx {

// Lane 8 i + r gives the address of row r of matrix i; register i receives matrix i.
__device__ inline void ldmatrix(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace marlin::ptx
