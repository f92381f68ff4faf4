// GPTQ's column loop over one segment of a weight, as the CPU and the GPU both see it.
//
//   for input j:   q = nearest code of work_j,  d = current_j - value of q
//                  work_i -= coupling[j, i] · d   for every i > j in the segment
//
// Inputs are rows, outputs columns; outputs never interact. Everything is FP32.
#pragma once

#include <cstdint>

namespace marlin {

inline constexpr int kMaxSegmentRows = 128;

struct ColumnSegment {
  const float* work;      // (rows, n)
  const float* coupling;  // (rows, rows), rows `coupling_pitch` floats apart
  int64_t coupling_pitch;
  int rows;
  int64_t n;
};

// Rounds a segment under one scale for each output.
struct ColumnsParams {
  ColumnSegment segment;
  const float* scale;    // (n)
  const float* current;  // (rows, n), or nullptr where it is `work` as it stands at input j
  float* codes;          // (rows, n), 0 … 15
  float* moved;          // (rows, n), the d of every input
};

// What rounding a segment would lose under several scales: the sum of weights_j · d².
struct TrialParams {
  ColumnSegment segment;
  const float* weights;  // (rows)
  const float* scales;   // (candidates, n)
  int64_t candidates;
  float* losses;  // (candidates, n)
};

}  // namespace marlin
