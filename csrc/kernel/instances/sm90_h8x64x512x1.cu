#include "kernel/sm90_launch.cuh"

namespace marlin {
template cudaError_t launch_sm90_shape<sm90_index("h8x64x512x1")>(const LaunchParams&,
                                                                  const TensorMaps&, Dtype, int,
                                                                  bool, cudaStream_t);
}  // namespace marlin
