// Compiled with -mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma.
namespace {
struct Isa {
  static constexpr const char* kName = "avx512";
  static constexpr int kLanes = 16;  // floats in a vector register
  static constexpr int kRegisters = 32;
};
}  // namespace

#include "cpu/kernels.inl"

namespace marlin::cpu {
const Kernels& avx512_kernels() { return kKernels; }
}  // namespace marlin::cpu
