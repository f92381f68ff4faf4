// What every operator on CUDA needs around its launches: device, stream, errors.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "torch/tensors.h"

namespace marlin::ops {

// Makes a tensor's device current for the scope and knows the stream to launch on.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor) : index_(tensor.get_device_index()) {
    // Mostly it is current: a guard would cost every call something.
    if (torch::stable::accelerator::getCurrentDeviceIndex() != index_) guard_.emplace(index_);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  int index() const { return index_; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  int index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

inline void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here: the next launch is not to find it
  fail(op, "launch", "a kernel that starts",
       join(cudaGetErrorName(error), ": ", cudaGetErrorString(error)));
}

}  // namespace marlin::ops
