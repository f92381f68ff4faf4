// The quantizer's column loop: a thread per output. The coupling of all inputs lies in shared memory,
// where every thread of a warp reads the same numbers; so do the distances that inputs have moved.
//
// Inputs come in blocks whose work stays in registers: what earlier blocks did to them is applied
// first, then the block is rounded input by input. So the loop over blocks needs no unrolling.
#include "kernel/columns.h"

#include <algorithm>

namespace marlin {
namespace {

constexpr int kThreads = 64;
constexpr int kBlockRows = 16;
constexpr int kTrialsPerThread = 8;  // candidates that share one copy of the coupling

constexpr int padded(int rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }

int shared_bytes(int rows) {
  return static_cast<int>(sizeof(float)) * padded(rows) * (padded(rows) + kThreads);
}

extern __shared__ float4 shared_memory[];

// Shared memory: coupling [padded rows][padded rows], then moved [padded rows][threads].
struct Shared {
  float* coupling = reinterpret_cast<float*>(shared_memory);
  float* moved;
  int pitch;

  __device__ explicit Shared(const ColumnSegment& segment) : pitch(padded(segment.rows)) {
    moved = coupling + pitch * pitch + threadIdx.x;
    for (int i = threadIdx.x; i < pitch * pitch; i += kThreads) {
      const int row = i / pitch, column = i % pitch;
      const bool inside = row < segment.rows && column < segment.rows;
      coupling[i] = inside ? segment.coupling[row * segment.coupling_pitch + column] : 0.0f;
    }
    __syncthreads();
  }
};

__device__ float nearest_level(float value, float divisor) {
  return fminf(fmaxf(rintf(__fdiv_rn(value, divisor)), -8.0f), 7.0f);
}

// work_i -= coupling[i] · moved for the inputs of a block.
__device__ void apply(const float* coupling, float moved, float (&work)[kBlockRows]) {
#pragma unroll
  for (int i = 0; i < kBlockRows; i += 4) {
    const float4 c = *reinterpret_cast<const float4*>(coupling + i);
    work[i] -= c.x * moved;
    work[i + 1] -= c.y * moved;
    work[i + 2] -= c.z * moved;
    work[i + 3] -= c.w * moved;
  }
}

// Rounds one output; `visit(row, level, moved)` hears of every input.
template <typename Visit>
__device__ void round_output(const ColumnSegment& segment, const float* current, float scale,
                             int64_t output, const Shared& shared, const Visit& visit) {
  const float divisor = scale == 0.0f ? INFINITY : scale;
  for (int first = 0; first < segment.rows; first += kBlockRows) {
    float work[kBlockRows];
#pragma unroll
    for (int i = 0; i < kBlockRows; ++i) {
      const int row = first + i;
      work[i] = row < segment.rows ? segment.work[row * segment.n + output] : 0.0f;
    }
    for (int j = 0; j < first; ++j)
      apply(shared.coupling + j * shared.pitch + first, shared.moved[j * kThreads], work);
#pragma unroll
    for (int j = 0; j < kBlockRows; ++j) {
      const int row = first + j;
      if (row >= segment.rows) break;
      const float level = nearest_level(work[j], divisor);
      const float before = current ? current[row * segment.n + output] : work[j];
      const float moved = before - level * scale;
      shared.moved[row * kThreads] = moved;
      visit(row, level, moved);
      const float* coupling = shared.coupling + row * shared.pitch + first;
#pragma unroll
      for (int i = j + 1; i < kBlockRows; ++i) work[i] -= coupling[i] * moved;
    }
  }
}

__global__ void __launch_bounds__(kThreads) quantize_columns_kernel(const ColumnsParams params) {
  const ColumnSegment& segment = params.segment;
  const Shared shared(segment);
  const int64_t output = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (output >= segment.n) return;
  round_output(segment, params.current, params.scale[output], output, shared,
               [&](int row, float level, float moved) {
                 params.codes[row * segment.n + output] = level + 8.0f;
                 params.moved[row * segment.n + output] = moved;
               });
}

__global__ void __launch_bounds__(kThreads) trial_losses_kernel(const TrialParams params) {
  const ColumnSegment& segment = params.segment;
  const Shared shared(segment);
  const int64_t output = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (output >= segment.n) return;
  const int64_t first = int64_t{blockIdx.y} * kTrialsPerThread;
  const int64_t last = min(first + kTrialsPerThread, params.candidates);
  for (int64_t candidate = first; candidate < last; ++candidate) {
    float loss = 0.0f;
    round_output(segment, nullptr, params.scales[candidate * segment.n + output], output, shared,
                 [&](int row, float, float moved) { loss += params.weights[row] * moved * moved; });
    params.losses[candidate * segment.n + output] = loss;
  }
}

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t grid_y,
                   cudaStream_t stream) {
  const ColumnSegment& segment = params.segment;
  if (segment.n == 0 || grid_y == 0) return cudaSuccess;
  const int bytes = shared_bytes(segment.rows);
  const cudaError_t error = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((segment.n + kThreads - 1) / kThreads),
                  static_cast<unsigned>(grid_y));
  kernel<<<grid, kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_quantize_columns(const ColumnsParams& params, cudaStream_t stream) {
  return launch(quantize_columns_kernel, params, 1, stream);
}

cudaError_t launch_trial_losses(const TrialParams& params, cudaStream_t stream) {
  return launch(trial_losses_kernel, params,
                (params.candidates + kTrialsPerThread - 1) / kTrialsPerThread, stream);
}

}  // namespace marlin
