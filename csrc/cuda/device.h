// The CUDA device as the ops see it: its current stream, memory from torch's allocators, launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <utility>

#include "../tensor_list.h"
#include "walk.cuh"

namespace sbp_fast::cuda {

// From its construction to its end the device of `tensor` is the current one.
class Device {
 public:
  explicit Device(const TensorView& tensor) : index_(tensor.device_index), guard_(index_) {
    // The CUDA runtime inside this library is its own copy: torch's guard does not set its device.
    check(cudaSetDevice(index_), "cudaSetDevice");
    void* stream = nullptr;
    SBP_FAST_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    refuse_capture();
  }

  // Memory on the device, uninitialised. torch's caching allocator hands it out for the current
  // stream, so the tensor may go out of scope while kernels on that stream still use it.
  torch::stable::Tensor empty(int64_t bytes) const {
    return allocate(bytes, torch::stable::Device(torch::headeronly::DeviceType::CUDA, index_),
                    false);
  }

  // Host memory for `upload`: pinned, so that the copy does not wait for the device. torch's host
  // allocator hands it out again only when the copies that were queued from it are done.
  torch::stable::Tensor staging(int64_t bytes) const {
    return allocate(bytes, torch::stable::Device(torch::headeronly::DeviceType::CPU), true);
  }

  torch::stable::Tensor upload(const torch::stable::Tensor& staged) const {
    torch::stable::Tensor uploaded = empty(staged.numel());
    torch::stable::copy_(uploaded, staged, /*non_blocking=*/true);
    return uploaded;
  }

  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks,
              Arguments... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(arguments...);
    check(cudaGetLastError(), name);
  }

 private:
  static torch::stable::Tensor allocate(int64_t bytes, torch::stable::Device device, bool pinned) {
    return torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device, pinned);
  }

  // A replayed graph would copy its table from a staging block that has long had another owner.
  void refuse_capture() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing");
    STD_TORCH_CHECK(status == cudaStreamCaptureStatusNone, "sbp_fast: the stream of cuda:", index_,
                    " is being captured into a CUDA graph, which the ops do not support; call them "
                    "outside the capture");
  }

  void check(cudaError_t error, const char* what) const {
    STD_TORCH_CHECK(error == cudaSuccess, "sbp_fast: ", what, " failed on cuda:", index_, ": ",
                    cudaGetErrorString(error), " (", cudaGetErrorName(error),
                    "); an earlier kernel may be the cause, CUDA_LAUNCH_BLOCKING=1 shows which");
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace sbp_fast::cuda
