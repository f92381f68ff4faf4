#include "dispatch/counters.h"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace marlin {
namespace {

constexpr int kSlices = 4096;  // 8 MB; a serving engine captures some 100 graphs
__device__ uint32_t counters[kSlices][kMaxSharedRuns];  // zero when the module is loaded

using Key = std::tuple<int, cudaStream_t, unsigned long long>;  // device, stream, capture or 0

class Slices {
 public:
  static Slices& all() {
    static auto* slices = new Slices;  // outlives every graph that gives a slice back
    return *slices;
  }

  uint32_t* find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = taken_.find(key);
    return found == taken_.end() ? nullptr : found->second;
  }

  // nullptr, with cudaSuccess, if none is left.
  uint32_t* take(const Key& key, cudaError_t& error) {
    const std::lock_guard lock(mutex_);
    auto [free, first_time] = free_.try_emplace(std::get<int>(key));
    if (first_time) {
      void* base = nullptr;
      error = cudaGetSymbolAddress(&base, counters);
      if (error != cudaSuccess) {
        free_.erase(free);
        return nullptr;
      }
      for (int i = kSlices; i-- > 0;)
        free->second.push_back(static_cast<uint32_t*>(base) + size_t(i) * kMaxSharedRuns);
    }
    if (free->second.empty()) return nullptr;
    uint32_t* slice = free->second.back();
    free->second.pop_back();
    return taken_[key] = slice;
  }

  void give_back(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = taken_.find(key);
    if (found == taken_.end()) return;
    free_[std::get<int>(key)].push_back(found->second);
    taken_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<Key, uint32_t*> taken_;
  std::map<int, std::vector<uint32_t*>> free_;  // by device
};

void give_back(void* key) {
  Slices::all().give_back(*static_cast<Key*>(key));
  delete static_cast<Key*>(key);
}

// Has `key` given back once the graph, and all that was instantiated from it, is gone.
cudaError_t tie_to_graph(const Key& key, cudaGraph_t graph) {
  auto* owned = new Key(key);
  cudaUserObject_t object = nullptr;
  cudaError_t error =
      cudaUserObjectCreate(&object, owned, give_back, 1, cudaUserObjectNoDestructorSync);
  if (error != cudaSuccess) {
    give_back(owned);
    return error;
  }
  error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaUserObjectRelease(object, 1);
  return error;
}

}  // namespace

uint32_t* counters_for(int device, cudaStream_t stream, cudaError_t& error) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
  error = cudaStreamGetCaptureInfo(stream, &status, &capture, &graph);
  if (error != cudaSuccess) return nullptr;
  const bool capturing = status == cudaStreamCaptureStatusActive;
  const Key key{device, stream, capturing ? capture : 0};
  if (uint32_t* found = Slices::all().find(key)) return found;
  uint32_t* slice = Slices::all().take(key, error);
  if (slice == nullptr || !capturing) return slice;
  error = tie_to_graph(key, graph);
  return error == cudaSuccess ? slice : nullptr;
}

}  // namespace marlin
