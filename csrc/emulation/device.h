// Stands in for cuda/device.h: the host's memory is the device's, and launches run in the
// emulation. With it the launch and registration code of csrc/cuda compiles into a library that
// needs no GPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cuda/walk.cuh"
#include "../tensor_list.h"

namespace sbp_fast::cuda {

class Device {
 public:
  explicit Device(const TensorView&) {}

  torch::stable::Tensor empty(int64_t bytes) const {
    return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CPU));
  }
  torch::stable::Tensor staging(int64_t bytes) const { return empty(bytes); }

  torch::stable::Tensor upload(const torch::stable::Tensor& staged) const {
    torch::stable::Tensor uploaded = empty(staged.numel());
    torch::stable::copy_(uploaded, staged);
    return uploaded;
  }

  template <typename... Parameters, typename... Arguments>
  void launch(const char*, void (*kernel)(Parameters...), int64_t blocks,
              Arguments... arguments) const {
    emulation::launch(kernel, blocks, kEmulatedThreads, arguments...);
  }

 private:
  // Kernels take any multiple of 32; two warps are the fewest that have something to add up.
  static constexpr unsigned kEmulatedThreads = 64;
};

}  // namespace sbp_fast::cuda
