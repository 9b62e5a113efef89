// Whether this library's kernels can run here, asked before a backend is chosen.
#ifndef SBP_FAST_CUDA_EMULATION
#include <cuda_runtime.h>

namespace sbp_fast::cuda {

// Compiled for the same architectures as all the others.
static __global__ void probe() {}

}  // namespace sbp_fast::cuda

// nullptr, or what CUDA says is wrong: the driver may be older than the runtime linked in here, or
// the device older than every architecture compiled for.
extern "C" __attribute__((visibility("default"))) const char* sbp_fast_cuda_probe() {
  int devices = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, sbp_fast::cuda::probe);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // else the next launch would report it as its own
  return cudaGetErrorString(error);
}
#endif
