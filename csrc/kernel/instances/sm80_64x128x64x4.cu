#include "kernel/sm80_launch.cuh"

namespace marlin {
template cudaError_t launch_shape<sm80_index("64x128x64x4")>(const LaunchParams&, Dtype, int,
                                                             cudaStream_t);
}  // namespace marlin
