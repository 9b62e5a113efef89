// The arithmetic of accumulation, one element at a time: what every native kernel, on the host or
// on a CUDA device, must compute. Kernels differ in how they walk memory, never in what they do
// here.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(SBP_FAST_CUDA_EMULATION)
#define SBP_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always: a copy that is called instead would be one for all instruction sets, compiled for any.
#define SBP_FAST_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sbp_fast {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// A value is non-finite when all its exponent bits are set. Testing bits survives -ffast-math and
// needs no comparison per class of value.
SBP_FAST_HOST_DEVICE bool is_non_finite(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7f800000u) == 0x7f800000u;
}

SBP_FAST_HOST_DEVICE bool is_non_finite(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x7ff0000000000000ull) == 0x7ff0000000000000ull;
}

// G += scale * G_i (the paper's G = sum of G_i), or G = scale * G_i when the accumulator holds
// nothing yet. Gradients are widened (or, float64 into float32, narrowed) to the accumulator's type
// first, so the product and the sum are rounded in that type.
template <bool kFirstWrite, typename accumulator_t>
SBP_FAST_HOST_DEVICE accumulator_t accumulate(accumulator_t accumulator, accumulator_t gradient,
                                              accumulator_t scale) {
  if constexpr (kFirstWrite) {
    return scale * gradient;
  } else {
    return accumulator + scale * gradient;
  }
}

// The factor of torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)). A NaN norm stays
// NaN, so a broken gradient is never made to look like a clipped one.
SBP_FAST_HOST_DEVICE double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

}  // namespace sbp_fast
