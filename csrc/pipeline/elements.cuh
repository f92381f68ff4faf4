// Reading and writing single elements whose type is known at run time only. For places that are not
// hot: scales of the simple kernels, biases, outputs of conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/types.h"

namespace marlin {

__device__ inline float load_element(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::kF16: return __half2float(static_cast<const __half*>(data)[index]);
    case Dtype::kBF16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

__device__ inline uint16_t half_bits(__half, float value) {
  return __half_as_ushort(__float2half_rn(value));
}
__device__ inline uint16_t half_bits(__nv_bfloat16, float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ constexpr Dtype dtype_of(__half) { return Dtype::kF16; }
__device__ constexpr Dtype dtype_of(__nv_bfloat16) { return Dtype::kBF16; }

// The bits of `value` rounded to Half.
template <typename Half>
__device__ inline uint16_t half_bits(float value) {
  return half_bits(Half{}, value);
}

}  // namespace marlin
