#include <map>
#include <mutex>
#include <tuple>

#include "dispatch/counters.h"

namespace marlin {
namespace {

constexpr int kSlices = 2048;
__device__ uint32_t counters[kSlices][kMaxSharedRuns];  // zero when the module is loaded

struct Slices {
  std::mutex mutex;
  std::map<int, uint32_t*> base;  // by device
  std::map<int, int> used;
  std::map<std::tuple<int, cudaStream_t, unsigned long long>, uint32_t*> slices;
};

Slices& all_slices() {
  static Slices slices;
  return slices;
}

}  // namespace

uint32_t* counters_for(int device, cudaStream_t stream, cudaError_t& error) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  error = cudaStreamGetCaptureInfo(stream, &status, &capture);
  if (error != cudaSuccess) return nullptr;
  if (status != cudaStreamCaptureStatusActive) capture = 0;

  Slices& all = all_slices();
  const std::lock_guard lock(all.mutex);
  const auto key = std::tuple(device, stream, capture);
  if (const auto found = all.slices.find(key); found != all.slices.end()) return found->second;
  uint32_t*& base = all.base[device];
  if (base == nullptr) {
    void* address = nullptr;
    error = cudaGetSymbolAddress(&address, counters);
    if (error != cudaSuccess) return nullptr;
    base = static_cast<uint32_t*>(address);
  }
  int& used = all.used[device];
  if (used == kSlices) return nullptr;
  return all.slices[key] = base + static_cast<size_t>(used++) * kMaxSharedRuns;
}

}  // namespace marlin
