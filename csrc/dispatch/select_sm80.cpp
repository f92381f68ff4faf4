#include "dispatch/select_sm80.h"

#include "dispatch/costs.h"
#include "dispatch/select.h"

namespace marlin {
namespace {

constexpr CostRow kCosts[] = {
#include "dispatch/sm80_costs.def"
};

constexpr bool every_shape_exists() {
  for (const CostRow& row : kCosts)
    if (sm80_index(row.shape) == kSm80Shapes.size()) return false;
  return true;
}
static_assert(every_shape_exists());

constexpr std::string_view kSmallestShape =
    "16x256x64x2";  // if even that does not fit, launching says so

}  // namespace

KernelConfig select_sm80(const Problem& problem, const Device& device) {
  if (const auto config = cheapest(kCosts, problem, device)) return *config;
  return {Engine::kSm80, sm80_index(kSmallestShape)};
}

}  // namespace marlin
