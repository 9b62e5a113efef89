// The engine of a CUDA device: one side stream, and two events for each slot.
//
// It is a part of the CUDA library, which loads only where there is a device; the ring's module
// knows it by the address of the function at the end.
#include <cuda_runtime.h>

#include <array>
#include <stdexcept>
#include <string>

#include "ring.h"

namespace sbp_fast::prefetch {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would report it as its own
  throw std::runtime_error(std::string("prefetching: ") + what +
                           " failed: " + cudaGetErrorString(error));
}

class CudaEngine final : public Engine {
 public:
  explicit CudaEngine(int device) : device_(device) {
    choose_device();
    check(cudaStreamCreateWithFlags(&side_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    for (auto* events : {&consumed_, &copied_}) {
      for (cudaEvent_t& event : *events) {
        check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
      }
    }
  }

  ~CudaEngine() override {
    // Errors are left: at the end of the process the driver may be gone already.
    for (auto* events : {&consumed_, &copied_}) {
      for (cudaEvent_t event : *events) cudaEventDestroy(event);
    }
    cudaStreamDestroy(side_);
  }

  void mark_consumed(int slot, Main main) override {
    choose_device();
    check(cudaEventRecord(consumed_[slot], stream(main)), "cudaEventRecord");
  }
  void wait_for_consumed(int slot) override {
    choose_device();
    check(cudaStreamWaitEvent(side_, consumed_[slot], 0), "cudaStreamWaitEvent");
  }
  void copy(void* device, const void* host, int64_t bytes) override {
    choose_device();
    check(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, side_),
          "cudaMemcpyAsync");
  }
  void mark_copied(int slot) override {
    choose_device();
    check(cudaEventRecord(copied_[slot], side_), "cudaEventRecord");
  }
  void wait_for_copied(int slot, Main main) override {
    choose_device();
    check(cudaStreamWaitEvent(stream(main), copied_[slot], 0), "cudaStreamWaitEvent");
  }
  void wait_on_host(int slot) override {
    choose_device();
    check(cudaEventSynchronize(copied_[slot]), "cudaEventSynchronize");
  }

 private:
  static cudaStream_t stream(Main main) { return reinterpret_cast<cudaStream_t>(main); }

  // Of the calling thread, in the CUDA runtime that is linked in here.
  void choose_device() const { check(cudaSetDevice(device_), "cudaSetDevice"); }

  const int device_;
  cudaStream_t side_ = nullptr;
  std::array<cudaEvent_t, Ring::kSlots> consumed_{}, copied_{};
};

}  // namespace
}  // namespace sbp_fast::prefetch

// The caller deletes it.
extern "C" __attribute__((visibility("default"))) sbp_fast::prefetch::Engine* sbp_fast_copy_engine(
    int device) {
  return new sbp_fast::prefetch::CudaEngine(device);
}
