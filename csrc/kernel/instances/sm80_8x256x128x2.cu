#include "kernel/sm80_launch.cuh"

namespace marlin {
template cudaError_t launch_shape<sm80_index("8x256x128x2")>(const LaunchParams&, Dtype, int,
                                                             cudaStream_t);
}  // namespace marlin
