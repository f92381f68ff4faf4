#include "torch/tensors.h"

#include <stdexcept>
#include <vector>

namespace marlin::ops {

void fail(const char* op, const char* argument, const std::string& expected,
          const std::string& got) {
  throw std::runtime_error(
      join("marlin::", op, ": ", argument, ": expected ", expected, ", got ", got));
}

std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU: return "cpu";
    case torch::headeronly::DeviceType::CUDA: return join("cuda:", int(device.index()));
    default: return join("device type ", int(device.type()));
  }
}

std::string describe(const Tensor& tensor) {
  std::string text = join(torch::headeronly::toString(tensor.scalar_type()), " (");
  for (int64_t i = 0; i < tensor.dim(); ++i) text += join(i > 0 ? ", " : "", tensor.size(i));
  return join(text, tensor.dim() == 1 ? ",)" : ")", " on ", device_name(tensor));
}

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF16: return ScalarType::Half;
    case Dtype::kBF16: return ScalarType::BFloat16;
    case Dtype::kF32: return ScalarType::Float;
  }
  return ScalarType::Undefined;
}

bool is_cuda(const Tensor& tensor) {
  return tensor.device().type() == torch::headeronly::DeviceType::CUDA;
}

Tensor empty_beside(const Tensor& like, std::span<const int64_t> sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type, device_index,
                                                  &handle));
  return Tensor(handle);
}

Tensor empty_beside(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty_beside(like, std::span(sizes.begin(), sizes.size()), type);
}

void blas_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                 const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(w), from(bias), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// Without addmm, which would add to `out`: its factors are Scalars, which the stable ABI cannot pass.
void blas_product(const Tensor& x, const Tensor& w, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(x), from(w), from(out.scalar_type()), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace marlin::ops
