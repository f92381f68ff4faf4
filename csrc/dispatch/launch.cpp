#include "dispatch/launch.h"

#include <algorithm>
#include <array>
#include <utility>

#include "dispatch/select.h"
#include "dispatch/tensor_map.h"
#include "format/shared_memory.h"
#include "kernel/sm80_launch.h"
#include "kernel/sm90_launch.h"

namespace marlin {
namespace {

using LaunchSm80 = cudaError_t (*)(const LaunchParams&, Dtype, int, cudaStream_t);
using LaunchSm90 = cudaError_t (*)(const LaunchParams&, const TensorMaps&, Dtype, int, bool,
                                   cudaStream_t);

constexpr auto kSm80Launchers = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
  return std::array<LaunchSm80, sizeof...(kIndex)>{&launch_shape<kIndex>...};
}
(std::make_index_sequence<kSm80Shapes.size()>{});

constexpr auto kSm90Launchers = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
  if constexpr (kBuiltForSm90)
    return std::array<LaunchSm90, sizeof...(kIndex)>{&launch_sm90_shape<kIndex>...};
  else return std::array<LaunchSm90, sizeof...(kIndex)>{};
}
(std::make_index_sequence<kSm90Shapes.size()>{});

cudaError_t launch_sm80(const LaunchParams& params, const Problem& problem, size_t shape,
                        cudaStream_t stream) {
  const int depth = kSm80Shapes[shape].shape.depth;
  const int groups_per_stage =
      problem.per_column() ? 0 : std::max(1, depth / static_cast<int>(params.gemm.group_rows));
  return kSm80Launchers[shape](params, problem.activation, groups_per_stage, stream);
}

cudaError_t launch_sm90(const LaunchParams& params, const Problem& problem, size_t shape,
                        bool chained, cudaStream_t stream) {
  const Sm90Shape& shape_of = kSm90Shapes[shape].shape;
  TensorMaps maps{};
  cudaError_t error = describe_x(params.gemm, problem.activation, shape_of, maps.x);
  if (error == cudaSuccess) error = describe_weight(params.gemm, shape_of, maps.words, maps.scales);
  if (error != cudaSuccess) return error;
  const int groups = problem.per_column() ? 0 : 128 / static_cast<int>(params.gemm.group_rows);
  return kSm90Launchers[shape](params, maps, problem.activation, groups, chained, stream);
}

}  // namespace

int64_t partials_bytes(const Problem& problem, const KernelConfig& config) {
  const Partition partition = partition_of(problem, config);
  const bool needed = shares_slices(partition) && !in_pairs(config, partition);
  return needed ? partition.runs * partial_bytes(config) : 0;
}

cudaError_t launch_engine(const GemmParams& gemm, const Problem& problem,
                          const KernelConfig& config, const Workspace& workspace, bool chained,
                          cudaStream_t stream) {
  const Partition partition = partition_of(problem, config);
  const LaunchParams params{gemm, partition, raster_of(problem, config),
                            in_pairs(config, partition), workspace};
  return config.engine == Engine::kSm80
             ? launch_sm80(params, problem, config.shape, stream)
             : launch_sm90(params, problem, config.shape, chained, stream);
}

}  // namespace marlin
