// The CPU kernels, written once with GCC/Clang vector types and compiled once per instruction set.
// Included by isa_*.cpp, which name the vector width and register count in `Isa`.
//
//   packed words --dequantize--> panel (64 rows of W x 64 columns, FP32, in L1)
//   x rows, panel --accumulate--> y (m x 64, FP32)
//
// Everything lives in an anonymous namespace: a function compiled for AVX-512 must never be the
// copy that the linker keeps for all.

#include <algorithm>
#include <cstring>

#include "cpu/backend.h"
#include "format/weight_words.h"

namespace marlin::cpu {
namespace {

using Ints = uint32_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));
using SignedInts = int32_t __attribute__((vector_size(32)));
using Wide = float __attribute__((vector_size(4 * Isa::kLanes)));

template <typename Vector>
inline Vector load(const void* source) {
  Vector value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

template <typename Vector>
inline void store(void* destination, Vector value) {
  std::memcpy(destination, &value, sizeof(value));
}

// What is subtracted from the codes of eight neighbouring columns: the same everywhere, or a zero
// point for each of a strip's columns.
struct FixedZero {
  void load_group(const PackedWeight&, int64_t, int64_t) {}
  SignedInts at(int) const { return SignedInts{} + kCodeZero; }
};

struct ZeroPoints {
  int32_t zeros[kTileColumns];

  void load_group(const PackedWeight& weight, int64_t group, int64_t strip) {
    load_strip_zeros(weight, group, strip, zeros);
  }
  SignedInts at(int column) const { return load<SignedInts>(zeros + column); }
};

// One 16 x 64 tile. The eight words of a (pair, block) become one vector, whose nibbles are eight
// neighbouring columns of one row.
template <typename Zero>
inline void dequantize_tile(const uint32_t* words, const float* scales, const Zero& zero,
                            float* panel, int64_t pitch) {
  uint32_t by_column[16][8];  // [4 * pair + block][lane's column]
  for (int column = 0; column < 8; ++column)
    for (int i = 0; i < 16; ++i) by_column[i][column] = words[16 * column + i];

  for (int pair = 0; pair < 4; ++pair) {
    for (int block = 0; block < 4; ++block) {
      const Ints word = load<Ints>(by_column[4 * pair + block]);
#pragma GCC unroll 8
      for (int nibble = 0; nibble < kCodesPerWord; ++nibble) {
        const int row = 2 * pair + nibble_row(nibble);
        const int column = 16 * block + nibble_column(nibble);
        const auto code =
            reinterpret_cast<SignedInts>(word >> (4 * nibble) & 0xfu) - zero.at(column);
        const Floats value = __builtin_convertvector(code, Floats);
        store(panel + row * pitch + column, value * load<Floats>(scales + column));
      }
    }
  }
}

template <typename Zero>
void dequantize_rows(const PackedWeight& weight, int64_t first_row, int64_t last_row, int64_t strip,
                     float* panel, int64_t pitch) {
  const int64_t group_rows = weight.k / weight.groups;
  float scales[kTileColumns];
  Zero zero;
  int64_t loaded = -1;
  for (int64_t row = first_row; row < last_row; row += kTileRows) {
    if (const int64_t group = row / group_rows; group != loaded) {
      load_strip_scales(weight, group, strip, scales);
      zero.load_group(weight, group, strip);
      loaded = group;
    }
    const uint32_t* words = weight.words + tile_offset(row / kTileRows, strip, weight.n);
    // Tiles of a strip lie 8 n bytes apart, too far for the hardware to guess the next one.
    const char* next = reinterpret_cast<const char*>(words + 2 * words_in_tile_row(weight.n));
    for (int line = 0; line < kTileWords * 4; line += 64) __builtin_prefetch(next + line);
    dequantize_tile(words, scales, zero, panel + (row - first_row) * pitch, pitch);
  }
}

void dequantize(const PackedWeight& weight, int64_t first_row, int64_t last_row, int64_t strip,
                float* panel, int64_t pitch) {
  if (weight.zeros) dequantize_rows<ZeroPoints>(weight, first_row, last_row, strip, panel, pitch);
  else dequantize_rows<FixedZero>(weight, first_row, last_row, strip, panel, pitch);
}

// y[Rows, Columns vectors] += x[Rows, depth] · panel: the sums stay in registers.
template <int Rows, int Columns>
inline void accumulate_block(const float* panel, int depth, const float* x, int64_t x_pitch,
                             float* y) {
  Wide sum[Rows][Columns];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c)
      sum[r][c] = load<Wide>(y + r * kTileColumns + c * Isa::kLanes);
  for (int i = 0; i < depth; ++i) {
    Wide w[Columns];
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) w[c] = load<Wide>(panel + i * kTileColumns + c * Isa::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const float broadcast = x[r * x_pitch + i];
#pragma GCC unroll 16
      for (int c = 0; c < Columns; ++c) sum[r][c] += broadcast * w[c];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < Columns; ++c) store(y + r * kTileColumns + c * Isa::kLanes, sum[r][c]);
}

// As many columns as fit beside the sums in the register file, for enough independent sums to
// cover the latency of an FMA also when there is one row.
template <int Rows>
inline void accumulate_rows(const float* panel, int depth, const float* x, int64_t x_pitch,
                            float* y) {
  constexpr int kVectors = kTileColumns / Isa::kLanes;
  constexpr int kFit = std::max(1, (Isa::kRegisters - 3) / (Rows + 1));
  constexpr int kColumns = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
  constexpr int kStep = std::min(kColumns, kVectors);
  for (int c = 0; c < kVectors; c += kStep) {
    accumulate_block<Rows, kStep>(panel + c * Isa::kLanes, depth, x, x_pitch, y + c * Isa::kLanes);
  }
}

inline constexpr int kMaxRows = 6;

void accumulate(const float* panel, int depth, const float* x, int64_t x_pitch, int64_t m,
                float* y) {
  const int64_t blocks = (m + kMaxRows - 1) / kMaxRows;
  int64_t row = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t rows = (m - row) / (blocks - block);  // as even as can be: 16 = 5 + 5 + 6
    const float* x_rows = x + row * x_pitch;
    float* y_rows = y + row * kTileColumns;
    switch (rows) {
      case 1: accumulate_rows<1>(panel, depth, x_rows, x_pitch, y_rows); break;
      case 2: accumulate_rows<2>(panel, depth, x_rows, x_pitch, y_rows); break;
      case 3: accumulate_rows<3>(panel, depth, x_rows, x_pitch, y_rows); break;
      case 4: accumulate_rows<4>(panel, depth, x_rows, x_pitch, y_rows); break;
      case 5: accumulate_rows<5>(panel, depth, x_rows, x_pitch, y_rows); break;
      default: accumulate_rows<6>(panel, depth, x_rows, x_pitch, y_rows); break;
    }
    row += rows;
  }
}

void multiply_strip(const PackedWeight& weight, int64_t strip, const float* x, int64_t x_pitch,
                    int64_t m, float* y) {
  alignas(64) float panel[kPanelRows * kTileColumns];
  std::memset(y, 0, sizeof(float) * m * kTileColumns);
  for (int64_t row = 0; row < weight.k; row += kPanelRows) {
    const int64_t last = std::min<int64_t>(row + kPanelRows, weight.k);
    dequantize(weight, row, last, strip, panel, kTileColumns);
    accumulate(panel, static_cast<int>(last - row), x + row, x_pitch, m, y);
  }
}

#include "cpu/columns.inl"

constexpr Kernels kKernels{Isa::kName,     Isa::kLanes,      dequantize,
                           multiply_strip, quantize_columns, trial_losses};

}  // namespace
}  // namespace marlin::cpu
