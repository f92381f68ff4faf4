// wgmma: D[64, N] += A[64, 16] · B[16, N] by a warpgroup, asynchronously. A in registers, four of each
// warp for its 16 rows, as mma.sync's; B in shared memory; D in registers, FP32: eight columns of D
// are an accumulator of mma.sync.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx/mma.cuh"
#include "ptx/shared_address.cuh"

namespace marlin::ptx {

// Before a warpgroup's first wgmma, and whenever registers that the next one uses were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending committed groups are still under way.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Describes rows of 128 bytes along k, swizzled (format/swizzle.h), that begin at `matrix`, which
// is aligned to 1024 bytes. + 2 is 16 columns further along k.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
__device__ inline uint64_t wgmma_descriptor(const void* matrix) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 / 16} << 32;  // from eight rows to the next
  return kSwizzle128 | kEightRows | uint64_t{1} << 16 | (shared_address(matrix) & 0x3ffff) >> 4;
}

// d += w · B. B: columns of X that `descriptor` tells.
template <typename Half, int kBatches>
__device__ inline void wgmma(const FragmentA& w, uint64_t descriptor, Accumulator (&d)[kBatches]);

// clang-format off
#define MARLIN_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MARLIN_D48 MARLIN_D32 \
  ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MARLIN_D64 MARLIN_D48 \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MARLIN_D96 MARLIN_D64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MARLIN_D128 MARLIN_D96 \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MARLIN_D192 MARLIN_D128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MARLIN_D256 MARLIN_D192 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MARLIN_V1(i) "+f"(d[i].values[0]), "+f"(d[i].values[1]), "+f"(d[i].values[2]), "+f"(d[i].values[3])
#define MARLIN_V2(i) MARLIN_V1(i), MARLIN_V1(i + 1)
#define MARLIN_V4(i) MARLIN_V2(i), MARLIN_V2(i + 2)
#define MARLIN_V8(i) MARLIN_V4(i), MARLIN_V4(i + 4)
#define MARLIN_V16(i) MARLIN_V8(i), MARLIN_V8(i + 8)
#define MARLIN_V32(i) MARLIN_V16(i), MARLIN_V16(i + 16)
#define MARLIN_VALUES32 MARLIN_V4(0)
#define MARLIN_VALUES48 MARLIN_V4(0), MARLIN_V2(4)
#define MARLIN_VALUES64 MARLIN_V8(0)
#define MARLIN_VALUES96 MARLIN_V8(0), MARLIN_V4(8)
#define MARLIN_VALUES128 MARLIN_V16(0)
#define MARLIN_VALUES192 MARLIN_V16(0), MARLIN_V8(16)
#define MARLIN_VALUES256 MARLIN_V32(0)
#define MARLIN_WGMMA(N, HALF, TYPE, A0, A1, A2, A3, DESCRIPTOR, ADD)                              \
  template <>                                                                                     \
  __device__ inline void wgmma<HALF, N / 8>(const FragmentA& w, uint64_t descriptor,              \
                                            Accumulator (&d)[N / 8]) {                            \
    asm volatile(                                                                                 \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %" #ADD ", 0;\n"                                    \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" MARLIN_D##N "}, "    \
        "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #DESCRIPTOR ", add, 1, 1, 0;\n}\n"          \
        : MARLIN_VALUES##N                                                                        \
        : "r"(w.registers[0]), "r"(w.registers[1]), "r"(w.registers[2]), "r"(w.registers[3]),     \
          "l"(descriptor), "n"(1));                                                               \
  }

MARLIN_WGMMA(32, __half, "f16", 16, 17, 18, 19, 20, 21)
MARLIN_WGMMA(32, __nv_bfloat16, "bf16", 16, 17, 18, 19, 20, 21)
MARLIN_WGMMA(48, __half, "f16", 24, 25, 26, 27, 28, 29)
MARLIN_WGMMA(48, __nv_bfloat16, "bf16", 24, 25, 26, 27, 28, 29)
MARLIN_WGMMA(64, __half, "f16", 32, 33, 34, 35, 36, 37)
MARLIN_WGMMA(64, __nv_bfloat16, "bf16", 32, 33, 34, 35, 36, 37)
MARLIN_WGMMA(96, __half, "f16", 48, 49, 50, 51, 52, 53)
MARLIN_WGMMA(96, __nv_bfloat16, "bf16", 48, 49, 50, 51, 52, 53)
MARLIN_WGMMA(128, __half, "f16", 64, 65, 66, 67, 68, 69)
MARLIN_WGMMA(128, __nv_bfloat16, "bf16", 64, 65, 66, 67, 68, 69)
MARLIN_WGMMA(192, __half, "f16", 96, 97, 98, 99, 100, 101)
MARLIN_WGMMA(192, __nv_bfloat16, "bf16", 96, 97, 98, 99, 100, 101)
MARLIN_WGMMA(256, __half, "f16", 128, 129, 130, 131, 132, 133)
MARLIN_WGMMA(256, __nv_bfloat16, "bf16", 128, 129, 130, 131, 132, 133)
#undef MARLIN_WGMMA
// clang-format on

}  // namespace marlin::ptx
