// mma.sync.m16n8k16: D[16, 8] += A[16, 16] · B[16, 8], one warp, FP32 accumulators.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace marlin::ptx {

struct FragmentA {
  uint32_t registers[4];
};
struct FragmentB {
  uint32_t registers[2];
};
struct Accumulator {
  float values[4];
};

template <typename Half>
__device__ inline void mma(const FragmentA& a, const FragmentB& b, Accumulator& d);

template <>
__device__ inline void mma<__half>(const FragmentA& a, const FragmentB& b, Accumulator& d) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d.values[0]), "+f"(d.values[1]), "+f"(d.values[2]), "+f"(d.values[3])
      : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]),
        "r"(b.registers[0]), "r"(b.registers[1]));
}

template <>
__device__ inline void mma<__nv_bfloat16>(const FragmentA& a, const FragmentB& b, Accumulator& d) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d.values[0]), "+f"(d.values[1]), "+f"(d.values[2]), "+f"(d.values[3])
      : "r"(a.registers[0]), "r"(a.registers[1]), "r"(a.registers[2]), "r"(a.registers[3]),
        "r"(b.registers[0]), "r"(b.registers[1]));
}

}  // namespace marlin::ptx
