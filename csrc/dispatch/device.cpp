#include "dispatch/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

#include "kernel/sm90_launch.h"

namespace marlin {
namespace {

constexpr int kMaxDevices = 64;

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&value, which, index); error != cudaSuccess)
    throw std::runtime_error(std::string("marlin: asking GPU ") + std::to_string(index) +
                             " for its properties: " + cudaGetErrorString(error));
  return value;
}

}  // namespace

const Device& device(int index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> asked;
  std::call_once(asked.at(index), [index] {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    devices[index] = {major, attribute(cudaDevAttrComputeCapabilityMinor, index),
                      attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                      major == 9 && kBuiltForSm90};
  });
  return devices[index];
}

}  // namespace marlin
