// Sums of the library's products, in FP32 → Y: added, with a bias of any type, and rounded once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernel/launch.h"
#include "pipeline/elements.cuh"

namespace marlin {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;  // a thread's

template <typename Half>
__global__ void __launch_bounds__(kThreads) round_sums_kernel(const RoundSumsParams p) {
  const int64_t quad = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t quads = p.rows * p.columns / kColumns;
  if (quad >= quads) return;
  const auto* sums = reinterpret_cast<const float4*>(p.sums);
  float4 sum = sums[quad];
  for (int term = 1; term < p.terms; ++term) {
    const float4 more = sums[term * quads + quad];
    sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
  }
  // Divisions of 64 bits would take as long as all the rest.
  const auto per_row = static_cast<uint32_t>(p.columns / kColumns);
  const uint32_t row = static_cast<uint32_t>(quad) / per_row;
  const uint32_t column = (static_cast<uint32_t>(quad) - row * per_row) * kColumns;
  if (p.bias != nullptr) {
    sum.x += load_element(p.bias, p.bias_dtype, column);
    sum.y += load_element(p.bias, p.bias_dtype, column + 1);
    sum.z += load_element(p.bias, p.bias_dtype, column + 2);
    sum.w += load_element(p.bias, p.bias_dtype, column + 3);
  }
  const uint2 rounded = {half_bits<Half>(sum.x) | uint32_t{half_bits<Half>(sum.y)} << 16,
                         half_bits<Half>(sum.z) | uint32_t{half_bits<Half>(sum.w)} << 16};
  *reinterpret_cast<uint2*>(static_cast<Half*>(p.y) + row * p.y_pitch + column) = rounded;
}

}  // namespace

cudaError_t launch_round_sums(const RoundSumsParams& params, cudaStream_t stream) {
  const int64_t quads = params.rows * params.columns / kColumns;
  const auto ctas = static_cast<unsigned>((quads + kThreads - 1) / kThreads);
  const auto kernel =
      params.dtype == Dtype::kF16 ? round_sums_kernel<__half> : round_sums_kernel<__nv_bfloat16>;
  kernel<<<ctas, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace marlin
