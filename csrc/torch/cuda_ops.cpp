// The operators on CUDA: checks, device, stream, launch.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "dispatch/counters.h"
#include "dispatch/device.h"
#include "dispatch/launch.h"
#include "dispatch/select.h"
#include "format/shared_memory.h"
#include "format/weight_words.h"
#include "kernel/launch.h"
#include "torch/checks.h"
#include "torch/cuda_dense.h"
#include "torch/cuda_scope.h"

namespace marlin::ops {
namespace {

constexpr std::string_view kReferenceName = "reference";
// "unchained", or "unchained:NAME": the same, but no kernel starts before its predecessor is done.
constexpr std::string_view kUnchainedName = "unchained";

void check_device(const char* op, int index) {
  const Device& gpu = device(index);
  if (gpu.major < 8)
    fail(op, "device", "a GPU of compute capability 8.0 or newer",
         join("cuda:", index, " of ", gpu.major, ".", gpu.minor));
}

GemmParams gemm_params(const MulCall& call, void* y) {
  const Problem& p = call.problem;
  return {call.x, call.x_pitch, call.words,     call.scales, call.bias,       y,         p.m,
          p.n,    p.k,          p.group_size(), p.scale,     call.bias_dtype, call.zeros};
}

KernelConfig find_config(const char* op, const Problem& problem, const Device& gpu,
                         const std::optional<std::string>& name) {
  if (!name) return select_again(problem, gpu);
  if (const auto config = parse_config(*name, problem, gpu)) return *config;
  std::string names = "reference, dense";
  for (const NamedShape& shape : kSm80Shapes) names += join(", ", shape.name);
  for (const NamedSm90Shape& shape : kSm90Shapes) names += join(", ", shape.name);
  fail(op, "config",
       "one of " + names +
           " that fits the GPU and the problem, or one with '@' and 1 to as many runs as it has "
           "tiles",
       "'" + *name + "'");
}

// A launch whose CTAs share slices needs counters and memory for partial sums; where no counters are
// left, every slice gets a CTA of its own.
void run_engine(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
                KernelConfig config, bool chained, void* y) {
  std::optional<Tensor> partials;
  Workspace workspace{};
  if (const int64_t bytes = partials_bytes(call.problem, config); bytes > 0) {
    cudaError_t error = cudaSuccess;
    workspace.counters = counters_for(scope.index(), scope.stream(), error);
    check_launch(op, error);
    if (workspace.counters == nullptr || config.runs * counters_per_run(config) > kMaxSharedRuns) {
      config.runs = static_cast<int>(partition_of(call.problem, config).slices);
    } else {
      partials = empty_beside(a, {bytes}, ScalarType::Byte);
      workspace.partials = partials->mutable_data_ptr();
    }
  }
  check_launch(op, launch_engine(gemm_params(call, y), call.problem, config, workspace, chained,
                                 scope.stream()));
}

// Whether the name asks for it, and then without asking: "unchained:16x256x64x2" -> "16x256x64x2".
bool take_unchained(std::optional<std::string>& name) {
  if (!name || !name->starts_with(kUnchainedName)) return false;
  constexpr size_t kLength = kUnchainedName.size();
  if (name->size() == kLength) name.reset();
  else if ((*name)[kLength] == ':') name->erase(0, kLength + 1);
  else return false;
  return true;
}

// The engines do not know zero points yet. The simple kernel and the net do, exactly, the net at the
// price of two products: us on an H200 with 64 rows 80 and 58 (4096x4096), 118 and 176 (4096x14336),
// 175 and 208 (8192x8192), with 96 rows 90 and 62, 204 and 177, 204 and 210. In FP16 the net does not
// hold every scale; it is taken all the same where the simple kernel would read the weights too often.
constexpr int64_t kSimpleRows = 64;

std::string_view name_with_zeros(const Problem& problem) {
  const bool many = problem.m > kSimpleRows && dense_holds_scales(problem);
  return many ? kDenseName : kReferenceName;
}

void multiply(const char* op, const DeviceScope& scope, const Tensor& a, const MulCall& call,
              std::optional<std::string> name, void* y) {
  check_device(op, scope.index());
  if (call.problem.m == 0) return;
  const bool chained = !take_unchained(name);
  if (call.zeros != nullptr) {
    if (!name) name = name_with_zeros(call.problem);
    if (name != kReferenceName && !name->starts_with(kDenseName))
      fail(op, "config", "nothing, 'reference' or 'dense' with zeros", "'" + *name + "'");
  }
  if (name == kReferenceName) {
    check_launch(op, launch_reference(gemm_params(call, y), call.problem, scope.stream()));
    return;
  }
  const KernelConfig chosen = find_config(op, call.problem, device(scope.index()), name);
  if (chosen.engine == Engine::kDense) multiply_dense(op, scope, a, call, chosen, y);
  else run_engine(op, scope, a, call, chosen, chained, y);
}

Tensor mul(const Tensor& a, const Tensor& b, const Tensor& s, std::optional<Tensor> bias,
           std::optional<std::string> config, std::optional<Tensor> zeros,
           std::optional<std::string> weight_type) {
  const DeviceScope scope(a);
  const MulCall call = check_mul("mul", a, b, s, bias, zeros, weight_type);
  Tensor y = new_output(a, call);
  multiply("mul", scope, a, call, std::move(config), y.mutable_data_ptr());
  return y;
}

void mul_out(const Tensor& a, const Tensor& b, const Tensor& s, std::optional<Tensor> bias,
             std::optional<std::string> config, std::optional<Tensor> zeros,
             std::optional<std::string> weight_type, Tensor out) {
  const DeviceScope scope(a);
  const MulCall call = check_mul("mul.out", a, b, s, bias, zeros, weight_type);
  check_output("mul.out", a, call, out);
  multiply("mul.out", scope, a, call, std::move(config), out.mutable_data_ptr());
}

Tensor pack(const Tensor& codes) {
  const Shape shape = check_codes("pack", codes);
  const DeviceScope scope(codes);
  Tensor b = empty_beside(codes, {shape.k / kTileRows, 2 * shape.n}, ScalarType::Int);
  check_launch("pack",
               launch_pack(static_cast<const uint8_t*>(codes.const_data_ptr()), shape.k, shape.n,
                           static_cast<uint32_t*>(b.mutable_data_ptr()), scope.stream()));
  return b;
}

Tensor unpack(const Tensor& b) {
  const Shape shape = check_words("unpack", b);
  const DeviceScope scope(b);
  Tensor codes = empty_beside(b, {shape.k, shape.n}, ScalarType::Byte);
  check_launch("unpack",
               launch_unpack(static_cast<const uint32_t*>(b.const_data_ptr()), shape.k, shape.n,
                             static_cast<uint8_t*>(codes.mutable_data_ptr()), scope.stream()));
  return codes;
}

Tensor reorder_scales(const char* op, const char* argument, const Tensor& scales, bool pack) {
  const Shape shape = check_reordered(op, argument, scales);
  const DeviceScope scope(scales);
  Tensor result = empty_beside(scales, {shape.groups, shape.n}, scales.scalar_type());
  const int element_bytes = scales.scalar_type() == ScalarType::Byte ? 1 : 2;
  check_launch(op, launch_reorder_scales(scales.const_data_ptr(), element_bytes, shape.groups,
                                         shape.n, pack, result.mutable_data_ptr(), scope.stream()));
  return result;
}

Tensor pack_scales(const Tensor& scales) {
  return reorder_scales("pack_scales", "scales", scales, true);
}

Tensor unpack_scales(const Tensor& s) { return reorder_scales("unpack_scales", "s", s, false); }

Tensor dequantize(const Tensor& b, const Tensor& s, std::optional<ScalarType> dtype,
                  std::optional<Tensor> zeros, std::optional<std::string> weight_type) {
  const Shape shape = check_weight("dequantize", b, s);
  const uint8_t* zero_points = check_zeros("dequantize", shape, s, zeros, weight_type);
  const Dtype type = check_value_type("dequantize", s, dtype);
  const DeviceScope scope(b);
  Tensor values = empty_beside(b, {shape.k, shape.n}, scalar_type(type));
  const DequantizeParams params{static_cast<const uint32_t*>(b.const_data_ptr()),
                                s.const_data_ptr(),
                                scale_dtype(s),
                                shape.k,
                                shape.n,
                                shape.groups,
                                type,
                                values.mutable_data_ptr(),
                                zero_points};
  check_launch("dequantize", launch_dequantize(params, scope.stream()));
  return values;
}

}  // namespace
}  // namespace marlin::ops

STABLE_TORCH_LIBRARY_IMPL(marlin, CUDA, m) {
  using namespace marlin::ops;
  m.impl("mul", TORCH_BOX(&mul));
  m.impl("mul.out", TORCH_BOX(&mul_out));
  m.impl("mul_inference", TORCH_BOX(&mul));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("pack_scales", TORCH_BOX(&pack_scales));
  m.impl("unpack_scales", TORCH_BOX(&unpack_scales));
  m.impl("dequantize", TORCH_BOX(&dequantize));
}
