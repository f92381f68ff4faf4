// FP16 and BF16 as bit patterns, for code without hardware half types.
// Branch-free, so a compiler can vectorize a loop over them.
#pragma once

#include <bit>
#include <cstdint>

namespace marlin {

// Normal numbers move exponent and mantissa into FP32's fields and correct the bias (15 -> 127);
// subnormals are an integer times 2^-24; Inf and NaN need FP32's exponent 255.
constexpr float half_to_float(uint16_t bits) {
  const uint32_t exponent = bits & 0x7c00u;
  const uint32_t fields = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(bits & 0x3ff) * 0x1p-24f);
  const uint32_t normal = fields + (112u << 23);
  const uint32_t special = fields | 0x7f800000u;
  const uint32_t magnitude = exponent == 0 ? subnormal : exponent == 0x7c00u ? special : normal;
  return std::bit_cast<float>(magnitude | static_cast<uint32_t>(bits & 0x8000) << 16);
}

// Round to nearest even. Adding (and removing) a power of two that puts FP16's last bit at FP32's
// last bit lets the FP32 adder do the rounding, for normal and subnormal results alike.
constexpr uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t half = 0;
  if (magnitude >= 0x7f800000u) {  // Inf stays Inf, NaN stays a quiet NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to Inf
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a subnormal half, in units of 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

constexpr float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

constexpr uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  const uint32_t odd = (bits >> 16) & 1u;
  return static_cast<uint16_t>((bits + 0x7fffu + odd) >> 16);
}

}  // namespace marlin
