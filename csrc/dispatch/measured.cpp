#include "dispatch/measured.h"

#include <algorithm>

#include "dispatch/select.h"

namespace marlin {
namespace {

// What was fastest for weights (k, n) and batches up to m, on a GPU with kTunedSms SMs. Where that was
// the net, the fastest shape of the engine follows: not every problem can take the net.
struct TunedRow {
  int64_t k;
  int64_t n;
  int64_t m;
  std::string_view shape;  // or kDenseName
  int runs;                // or slices

  constexpr bool dense() const { return shape == kDenseName; }
};

constexpr int kTunedSms = 132;
constexpr TunedRow kTuned[] = {
#include "dispatch/sm90_table.def"
};

constexpr bool every_shape_exists() {
  for (const TunedRow& row : kTuned)
    if (!row.dense() && sm90_index(row.shape) == kSm90Shapes.size()) return false;
  return true;
}
static_assert(every_shape_exists());

// The batch size whose rows hold this problem: the next one that was measured.
int64_t tuned_batch(int64_t m) {
  int64_t next = 0, largest = 0;
  for (const TunedRow& row : kTuned) {
    largest = std::max(largest, row.m);
    if (row.m >= m && (next == 0 || row.m < next)) next = row.m;
  }
  return next == 0 ? largest : next;
}

// The first row of this weight that the problem can take, or nullptr.
const TunedRow* row_of(const Problem& problem) {
  const int64_t batch = tuned_batch(problem.m);
  for (const TunedRow& row : kTuned)
    if (row.k == problem.k && row.n == problem.n && row.m == batch &&
        (!row.dense() || dense_holds_any_scales(problem)))
      return &row;
  return nullptr;
}

}  // namespace

std::optional<KernelConfig> measured(const Problem& problem, const Device& device) {
  if (!device.sm90_engine || device.sm_count != kTunedSms) return std::nullopt;
  const TunedRow* row = row_of(problem);
  if (row == nullptr) return std::nullopt;
  if (row->dense()) return KernelConfig{Engine::kDense, 0, row->runs};
  const KernelConfig config{Engine::kSm90, sm90_index(row->shape), row->runs};
  Problem tuned = problem;
  tuned.m = row->m;
  const bool as_measured = row_tiles(tuned, config) == row_tiles(problem, config);
  if (!as_measured || !can_run(config, problem, device)) return std::nullopt;
  return config;
}

}  // namespace marlin
