// What the simple kernels offer to the host: launch functions, without Torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/gemm.h"

namespace marlin {

// The simple kernel: plain loads and mma.sync, for any GPU from 8.0 on. The reference that faster
// kernels are tested against on the device.
cudaError_t launch_reference(const GemmParams& params, const Problem& problem, cudaStream_t stream);

// codes (k, n) bytes <-> words. Packing keeps the low four bits of each code.
cudaError_t launch_pack(const uint8_t* codes, int64_t k, int64_t n, uint32_t* words,
                        cudaStream_t stream);
cudaError_t launch_unpack(const uint32_t* words, int64_t k, int64_t n, uint8_t* codes,
                          cudaStream_t stream);

// Reorders `groups` rows of n scales (2 bytes) or zero points (1 byte) into Marlin's order, or back.
cudaError_t launch_reorder_scales(const void* source, int element_bytes, int64_t groups, int64_t n,
                                  bool pack, void* target, cudaStream_t stream);

struct DequantizeParams {
  const uint32_t* words;
  const void* scales;
  Dtype scale_dtype;
  int64_t k;
  int64_t n;
  int64_t groups;
  Dtype value_dtype;
  void* values;                    // (k, columns), contiguous
  const uint8_t* zeros = nullptr;  // (groups, n) like the scales; nullptr: all kCodeZero
  int64_t first_strip = 0;         // of 64 columns
  int64_t strips = 0;              // how many; 0: all there are
  bool remainder = false;          // of 16-bit values: what rounding to them takes off instead
};
cudaError_t launch_dequantize(const DequantizeParams& params, cudaStream_t stream);

// Y = the terms' sum + bias, in FP32, rounded once.
struct RoundSumsParams {
  const float* sums;  // `terms` times (rows, columns), one after another
  int terms;
  int64_t rows;
  int64_t columns;   // a multiple of 64
  const void* bias;  // (columns) or nullptr
  Dtype bias_dtype;
  Dtype dtype;  // of y, 16 bits
  void* y;      // (rows, columns), 8-byte aligned, rows y_pitch elements apart
  int64_t y_pitch;
};
cudaError_t launch_round_sums(const RoundSumsParams& params, cudaStream_t stream);

}  // namespace marlin
