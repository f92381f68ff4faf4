#include "dispatch/tensor_map.h"

#include <array>
#include <cstdint>
#include <vector>

#include "format/swizzle.h"
#include "format/weight_words.h"

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

// A matrix and a box of it. Sizes and box: elements of a row, then rows.
struct Matrix {
  CUtensorMapDataType type;
  const void* data;
  std::array<int64_t, 2> sizes;
  int64_t pitch_bytes;  // from row to row
  std::array<int, 2> box;
  CUtensorMapSwizzle swizzle;
  CUtensorMapL2promotion promotion;  // what L2 takes from memory at least
};

cudaError_t describe(const Matrix& matrix, CUtensorMap& map) {
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  const std::array sizes{static_cast<cuuint64_t>(matrix.sizes[0]),
                         static_cast<cuuint64_t>(matrix.sizes[1])};
  const std::array pitch{static_cast<cuuint64_t>(matrix.pitch_bytes)};
  const std::array box{static_cast<cuuint32_t>(matrix.box[0]),
                       static_cast<cuuint32_t>(matrix.box[1])};
  constexpr std::array<cuuint32_t, 2> kSteps{1, 1};
  const CUresult result =
      encode(&map, matrix.type, 2, const_cast<void*>(matrix.data), sizes.data(), pitch.data(),
             box.data(), kSteps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, matrix.swizzle,
             matrix.promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t describe_words(const GemmParams& gemm, const Sm90Shape& shape, CUtensorMap& map) {
  static_assert(kTileWords == 2 * kTileColumns,
                "a row of tiles has as many 64-bit elements as columns");
  return describe({.type = CU_TENSOR_MAP_DATA_TYPE_UINT64,
                   .data = gemm.words,
                   .sizes = {gemm.n, gemm.k / kTileRows},
                   .pitch_bytes = 8 * gemm.n,
                   .box = {shape.columns, shape.depth / kTileRows},
                   .swizzle = CU_TENSOR_MAP_SWIZZLE_NONE,
                   // With 256 bytes m = 1 takes 4 to 8 % longer, in spite of whole lines of 512.
                   .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B},
                  map);
}

cudaError_t describe_scales(const GemmParams& gemm, const Sm90Shape& shape, CUtensorMap& map) {
  const int groups = static_cast<int>(shape.depth / gemm.group_rows);
  return describe({.type = CU_TENSOR_MAP_DATA_TYPE_UINT16,
                   .data = gemm.scales,
                   .sizes = {gemm.n, gemm.k / gemm.group_rows},
                   .pitch_bytes = 2 * gemm.n,
                   .box = {shape.columns, groups > 1 ? groups : 1},
                   .swizzle = CU_TENSOR_MAP_SWIZZLE_NONE,
                   .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B},
                  map);
}

// What the maps of a weight depend on.
struct Weight {
  const void* words = nullptr;
  const void* scales = nullptr;
  int64_t n = 0, k = 0, group_rows = 0;
  int columns = 0, depth = 0;

  bool operator==(const Weight&) const = default;
  size_t hash(size_t below) const {
    const uint64_t mixed = reinterpret_cast<uintptr_t>(words) / 16 * 31 + columns + depth;
    return (mixed * 0x9e3779b97f4a7c15 >> 32) % below;
  }
};

}  // namespace

cudaError_t describe_x(const GemmParams& gemm, Dtype type, const Sm90Shape& shape,
                       CUtensorMap& map) {
  const bool f16 = type == Dtype::kF16;
  return describe({.type = f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                   .data = gemm.x,
                   .sizes = {gemm.k, gemm.m},
                   .pitch_bytes = 2 * (gemm.m == 1 ? gemm.k : gemm.x_pitch),
                   .box = {kPanelColumns, shape.rows / shape.twins},
                   .swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                   .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B},
                  map);
}

cudaError_t describe_weight(const GemmParams& gemm, const Sm90Shape& shape, CUtensorMap& words,
                            CUtensorMap& scales) {
  struct Entry {
    Weight weight;
    CUtensorMap words, scales;
  };
  constexpr size_t kEntries = 1024;  // more layers than models have
  static thread_local std::vector<Entry> entries(kEntries);
  const Weight weight{gemm.words,      gemm.scales,   gemm.n,     gemm.k,
                      gemm.group_rows, shape.columns, shape.depth};
  Entry& entry = entries[weight.hash(kEntries)];
  if (!(entry.weight == weight)) {
    entry.weight = {};
    cudaError_t error = describe_words(gemm, shape, entry.words);
    if (error == cudaSuccess && gemm.group_rows < gemm.k)
      error = describe_scales(gemm, shape, entry.scales);
    if (error != cudaSuccess) return error;
    entry.weight = weight;
  }
  words = entry.words;
  scales = entry.scales;
  return cudaSuccess;
}

}  // namespace marlin
