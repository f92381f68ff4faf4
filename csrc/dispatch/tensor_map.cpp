#include "dispatch/tensor_map.h"

#include <array>

#include "format/swizzle.h"

namespace marlin {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// From the driver, which is not linked: the library also loads where there is none.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr unsigned kCuda12 = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kCuda12, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

}  // namespace

cudaError_t describe_activations(const GemmParams& gemm, Dtype type, int rows, CUtensorMap& map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto k = static_cast<cuuint64_t>(gemm.k), m = static_cast<cuuint64_t>(gemm.m);
  const auto pitch = static_cast<cuuint64_t>(m == 1 ? gemm.k : gemm.x_pitch);
  const std::array<cuuint64_t, 2> sizes{k, m};
  const std::array<cuuint64_t, 1> pitch_bytes{2 * pitch};
  const std::array<cuuint32_t, 2> box{kPanelColumns, static_cast<cuuint32_t>(rows)};
  const std::array<cuuint32_t, 2> steps{1, 1};
  const CUresult result = encode(
      &map,
      type == Dtype::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
      const_cast<void*>(gemm.x), sizes.data(), pitch_bytes.data(), box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace marlin
