#include "kernel/sm90_launch.cuh"

namespace marlin {
template cudaError_t launch_sm90_shape<sm90_index("h48x256x128x2")>(const LaunchParams&,
                                                                    const TensorMaps&, Dtype, int,
                                                                    bool, cudaStream_t);
}  // namespace marlin
