// The vocabulary every room shares: element types and the problem a call states.
// constexpr C++20 without CUDA and without Torch, so tests run it on any machine.
#pragma once

#include <cstdint>

namespace marlin {

enum class Dtype : uint8_t { kF16, kBF16, kF32 };

constexpr const char* name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16: return "float16";
    case Dtype::kBF16: return "bfloat16";
    case Dtype::kF32: return "float32";
  }
  return "?";
}

constexpr int size_bytes(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// What a code means: value = (code - zero) * scale.
enum class WeightType : uint8_t {
  kUint4b8,  // codes 0..15, zero = 8 for all
  kUint4,    // codes 0..15, a zero point of 0..16 beside every scale
};

constexpr const char* name(WeightType type) {
  switch (type) {
    case WeightType::kUint4b8: return "uint4b8";
    case WeightType::kUint4: return "uint4";
  }
  return "?";
}

// Y[m, n] = X[m, k] · W[k, n]. `groups` rows of scales, each covering k / groups rows of W; one
// group is "per column", which also selects the per-column scale order (format/scale_order.h).
struct Problem {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t groups = 1;
  Dtype activation = Dtype::kF16;  // X and Y
  Dtype scale = Dtype::kF16;
  WeightType weight = WeightType::kUint4b8;

  constexpr int64_t group_size() const { return k / groups; }
  constexpr bool per_column() const { return groups == 1; }
  constexpr bool operator==(const Problem&) const = default;
};

}  // namespace marlin
