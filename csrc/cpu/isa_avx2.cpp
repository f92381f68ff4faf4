// Compiled with -mavx2 -mfma.
namespace {
struct Isa {
  static constexpr const char* kName = "avx2";
  static constexpr int kLanes = 8;  // floats in a vector register
  static constexpr int kRegisters = 16;
};
}  // namespace

#include "cpu/kernels.inl"

namespace marlin::cpu {
const Kernels& avx2_kernels() { return kKernels; }
}  // namespace marlin::cpu
