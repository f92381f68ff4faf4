#include "kernel/sm80_launch.cuh"

namespace marlin {
template cudaError_t launch_shape<sm80_index("128x256x64x1")>(const LaunchParams&, Dtype, int,
                                                              cudaStream_t);
}  // namespace marlin
