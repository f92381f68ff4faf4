#include "dispatch/launch.h"

#include <algorithm>
#include <array>
#include <utility>

#include "dispatch/select.h"
#include "format/shared_memory.h"
#include "kernel/sm80_launch.h"

namespace marlin {
namespace {

using LaunchShape = cudaError_t (*)(const Sm80Params&, Dtype, int, cudaStream_t);

constexpr auto kLaunchers = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
  return std::array<LaunchShape, sizeof...(kIndex)>{&launch_shape<kIndex>...};
}
(std::make_index_sequence<kSm80Shapes.size()>{});

}  // namespace

int64_t partials_bytes(const Problem& problem, const KernelConfig& config) {
  const Partition partition = partition_of(problem, config);
  return shares_slices(partition) ? partition.runs * partial_bytes(kSm80Shapes[config.shape].shape)
                                  : 0;
}

cudaError_t launch_sm80(const GemmParams& gemm, const Problem& problem, const KernelConfig& config,
                        const Workspace& workspace, cudaStream_t stream) {
  const Sm80Params params{gemm, partition_of(problem, config),
                          static_cast<int>(row_tiles(problem, config)), workspace};
  const int depth = kSm80Shapes[config.shape].shape.depth;
  const int groups_per_stage =
      problem.per_column() ? 0 : std::max(1, depth / static_cast<int>(gemm.group_rows));
  return kLaunchers[config.shape](params, problem.activation, groups_per_stage, stream);
}

}  // namespace marlin
