// Scales that will multiply weights, made ready in shared memory by a warp of the producers.
//
// FP16 has little room for weights that are scaled while they are dequantized (dequant/uint4b8.cuh), so
// a stage's scales are shifted by a power of two to where they fit, and the sums are in its unit. It
// changes when the scales of a stage leave that range. Scales too far apart for any shift, and those
// that are not finite, multiply weights in a step of their own, in the unit one.
#pragma once

#include <type_traits>

#include "dequant/uint4b8.cuh"
#include "pipeline/ring.cuh"

namespace marlin {

// Whether somebody looks at a stage's scales before they are used.
template <Sm90Shape kShape, int kGroups>
inline constexpr bool kPrepareScales = kGroups > 0 && kShape.wgmma;

// Arrivals that fill a stage: of those who bring X, words, and scales.
template <Sm90Shape kShape, int kGroups>
inline constexpr int kProducers = kGroups == 0
                                      ? 2
                                      : 2 + (kPrepareScales<kShape, kGroups> ? kWarpArrivals : 1);

// The groups of a stage: one also where a group is longer than a stage.
template <Sm90Shape kShape, int kGroups>
struct StageGroups {
  static constexpr int kGroupRows = kGroups > 0 ? 128 / kGroups : 0;
  static constexpr int kCount =
      kGroups == 0 ? 0 : (kShape.depth > kGroupRows ? kShape.depth / kGroupRows : 1);
};

// The least magnitude but zero and the greatest of some FP16 numbers, as bits.
struct Magnitudes {
  uint32_t least = 0x7bff7bff;
  uint32_t greatest = 0;

  __device__ void include(uint32_t pair) {
    const auto magnitudes = as_pair<__half2>(pair & 0x7fff7fff);
    const auto is_zero = __heq2(magnitudes, as_pair<__half2>(0));
    const auto not_zero = __hfma2(is_zero, as_pair<__half2>(0x7bff7bff), magnitudes);
    least = as_bits(__hmin2(as_pair<__half2>(least), not_zero));
    greatest = as_bits(__hmax2_nan(as_pair<__half2>(greatest), magnitudes));
  }
  __device__ Magnitudes of_warp() const {
    return {__reduce_min_sync(~0u, min(least & 0xffff, least >> 16)),
            __reduce_max_sync(~0u, max(greatest & 0xffff, greatest >> 16))};
  }
};

// 2^exponent, for -126 to 127, and for -14 to 15 as a pair of halves.
__device__ inline float power_of_two(int exponent) {
  return __int_as_float((exponent + 127) << 23);
}
__device__ inline uint32_t power_of_two_pair(int exponent) {
  return static_cast<uint32_t>(exponent + 15) * 0x04000400;
}

// For FP16; a whole warp calls it for one stage after the other.
template <int kGroups, Sm90Shape kShape>
class ScalePreparer {
  static constexpr int kChunks = StageGroups<kShape, kGroups>::kCount * kShape.columns / 8;

 public:
  __device__ ScaleForm prepare(Chunk* chunks) {
    Magnitudes found;
    for (int i = threadIdx.x % 32; i < kChunks; i += 32)
#pragma unroll
      for (uint32_t pair : chunks[i].words) found.include(pair);
    found = found.of_warp();
    if (can_fuse(found)) {
      multiply(chunks, low_factor_, high_factor_);
      return {0, shift_ + kFusedUnit};
    }
    // A weight of up to eight scales must not overflow. (Scales below 2^-11 beside one so large, or one
    // that is not finite, lose up to three bits to that.)
    if (found.greatest < kTooLarge) return {1, 0};
    multiply(chunks, power_of_two_pair(-3), power_of_two_pair(0));
    return {8, 0};
  }

 private:
  static constexpr uint32_t kTooLarge = 0x7000;  // 8192
  static constexpr uint32_t kInfinity = 0x7c00;
  // Where shifted exponents (of two) may be. Small ones round coarsely, so a stage's greatest stays
  // within a few of the top; a new shift leaves room for one more.
  static constexpr int kLeast = -8, kLow = -4, kTop = -1;

  __device__ bool can_fuse(const Magnitudes& found) {
    if (found.greatest >= kInfinity) return false;
    if (found.greatest == 0) return true;
    // Subnormal numbers count as 2^-24, or 2^-15: what bounds them.
    const int least = found.least < 0x400 ? -24 : static_cast<int>(found.least >> 10) - 15;
    const int greatest = static_cast<int>(found.greatest >> 10) - 15;
    if (greatest - least >= kTop - kLeast) return false;
    const bool stays =
        greatest + shift_ <= kTop && greatest + shift_ >= kLow && least + shift_ >= kLeast;
    if (!stays) set_shift(kTop - 1 - greatest);
    return true;
  }

  __device__ void set_shift(int shift) {
    shift_ = shift;
    const int factor = shift + kFusedStored;  // up to 24: in two steps
    const int low = min(factor, 15);
    low_factor_ = power_of_two_pair(low);
    high_factor_ = power_of_two_pair(factor - low);
  }

  static __device__ void multiply(Chunk* chunks, uint32_t low_factor, uint32_t high_factor) {
    const auto low = as_pair<__half2>(low_factor), high = as_pair<__half2>(high_factor);
    for (int i = threadIdx.x % 32; i < kChunks; i += 32) {
      Chunk chunk = chunks[i];
#pragma unroll
      for (uint32_t& pair : chunk.words)
        pair = as_bits(__hmul2(__hmul2(as_pair<__half2>(pair), low), high));
      chunks[i] = chunk;
    }
  }

  int shift_ = 0;
  uint32_t low_factor_ = power_of_two_pair(kFusedStored);
  uint32_t high_factor_ = power_of_two_pair(0);
};

// For bfloat16, which has the range: FP16's scales are rounded to it.
template <int kGroups, Sm90Shape kShape>
class ScaleConverter {
  static constexpr int kChunks = StageGroups<kShape, kGroups>::kCount * kShape.columns / 8;

 public:
  __device__ explicit ScaleConverter(Dtype dtype) : dtype_(dtype) {}

  __device__ ScaleForm prepare(Chunk* chunks) const {
    if (dtype_ == Dtype::kF16)
      for (int i = threadIdx.x % 32; i < kChunks; i += 32)
#pragma unroll
        for (uint32_t& pair : chunks[i].words)
          pair = as_bits(__float22bfloat162_rn(__half22float2(as_pair<__half2>(pair))));
    return {1, 0};
  }

 private:
  Dtype dtype_;
};

template <typename Half, int kGroups, Sm90Shape kShape>
__device__ void prepare_all_scales(Sm90Shared<kShape>& shared, const LaunchParams& params,
                                   int run) {
  auto preparer = [&] {
    if constexpr (std::is_same_v<Half, __half>) return ScalePreparer<kGroups, kShape>();
    else return ScaleConverter<kGroups, kShape>(params.gemm.scale_dtype);
  }();
  RingPlace<kShape.stages, 1> place(0);
  const int64_t tiles = params.partition.tiles_of(run);
#pragma unroll 1
  for (int64_t i = 0; i < tiles; ++i, place.advance()) {
    ptx::mbarrier_wait(&shared.scales_full[place.slot], place.parity);
    const ScaleForm form = preparer.prepare(&shared.scales[place.slot][0][0][0]);
    if (threadIdx.x % 32 == 0) shared.scale_forms[place.slot] = form;
    arrive_together(&shared.full[place.slot], threadIdx.x % 32);
  }
}

}  // namespace marlin
