// The sums of a thread, four at a time, as its registers hold them: given to others, or grown by what
// others gave.
#pragma once

#include "epilogue/rows.cuh"
#include "pipeline/sums.cuh"

namespace marlin {

// The first or the last half of a thread's rows.
template <int kBatches, int kCount>
__device__ Sums<kBatches / 2, kCount> half_of(const Sums<kBatches, kCount>& sums, bool first) {
  constexpr int kHalf = kBatches / 2;
  Sums<kHalf, kCount> half;
#pragma unroll
  for (int block = 0; block < kCount; ++block)
#pragma unroll
    for (int batch = 0; batch < kHalf; ++batch)
      half.values[block][batch] =
          first ? sums.values[block][batch] : sums.values[block][batch + kHalf];
  return half;
}

// The fours of a thread go in bundles: those of rows that do not exist may be left out, and all loads of
// a bundle come before its first addition, since memory takes its time, however many ask.
template <int kBatches, int kCount>
struct Bundles {
  static constexpr int kFours = kBatches * kCount;
  static constexpr int kLength = kFours <= 16 ? kFours : kFours % 16 == 0 ? 16 : 12;
  static_assert(kFours % kLength == 0);

  static __device__ float4& four(Sums<kBatches, kCount>& sums, int i) {
    return reinterpret_cast<float4&>(sums.values[i % kCount][i / kCount]);
  }
  static __device__ bool exists(int first, int64_t rows_left) {
    return 8 * (first / kCount) < rows_left;
  }

  // How many fours are given, or added.
  static __device__ int count(int64_t rows_left) {
    int count = 0;
#pragma unroll
    for (int first = 0; first < kFours; first += kLength)
      if (exists(first, rows_left)) count += kLength;
    return count;
  }

  // sums += load(i) for every i.
  template <typename Load>
  static __device__ void add(Sums<kBatches, kCount>& sums, int64_t rows_left, const Load& load) {
#pragma unroll
    for (int first = 0; first < kFours; first += kLength) {
      if (!exists(first, rows_left)) break;
      float4 theirs[kLength];
#pragma unroll
      for (int i = 0; i < kLength; ++i) theirs[i] = load(first + i);
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        float4& mine = four(sums, first + i);
        mine = mine + theirs[i];
      }
    }
  }

  // store(i, four) for every i.
  template <typename Store>
  static __device__ void give(Sums<kBatches, kCount>& sums, int64_t rows_left, const Store& store) {
#pragma unroll
    for (int first = 0; first < kFours; first += kLength) {
      if (!exists(first, rows_left)) break;
#pragma unroll
      for (int i = first; i < first + kLength; ++i) store(i, four(sums, i));
    }
  }
};

}  // namespace marlin
