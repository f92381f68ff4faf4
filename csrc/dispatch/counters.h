// Counters for the handover between CTAs: device memory that is zero whenever no kernel uses it.
//
// Launches that may run at the same time must not share counters. Those on one stream touch them
// one after another (a kernel that starts early waits for its predecessors first), so each stream
// has a slice of its own, for ever. But two graphs captured on one stream may replay at the same
// time, so each capture has one, too, and gives it back when its graph is destroyed.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace marlin {

inline constexpr int kMaxSharedRuns = 512;  // counters of a slice

// The slice for a launch on this stream now. nullptr if none is left, with cudaSuccess in `error`: then
// only partitions without shared slices may run.
uint32_t* counters_for(int device, cudaStream_t stream, cudaError_t& error);

}  // namespace marlin
