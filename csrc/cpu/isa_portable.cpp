// SSE2, NEON, or whatever the compiler's baseline has.
namespace {
struct Isa {
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 4;  // floats in a vector register
  static constexpr int kRegisters = 16;
};
}  // namespace

#include "cpu/kernels.inl"

namespace marlin::cpu {
const Kernels& portable_kernels() { return kKernels; }
}  // namespace marlin::cpu
