// The batch norm kernels: functions of one instruction set, each for one block of a tensor. Who
// does which block is the business of batch_norm.cpp.
#pragma once

#include <cstdint>

namespace sbp_fast::cpu {

// A part of a dense tensor (see batch_norm_layout.h) from its first element on: of `channels`
// neighbouring channels the same `outer` runs of `inner` elements. Strides in elements: from one
// run of a channel to its next, and from a run to the neighbouring channel's.
struct ChannelBlock {
  int64_t outer;
  int64_t outer_stride;
  int64_t channels;
  int64_t channel_stride;
  int64_t inner;
};

// Rows of coefficients and of results have one double per channel of the block.

// A mean is pivot + distance: where it is far from zero, the distance is exact long after the sum
// is not.
struct MomentRows {
  double* pivot;
  double* distance;
  double* m2;
};
using MomentsKernel = void (*)(const void* input, const ChannelBlock& block,
                               const MomentRows& result);
// sum(dy) and sum(dy * xhat).
using BackwardSumsKernel = void (*)(const void* grad_output, const void* input,
                                    const ChannelBlock& block, const double* mean,
                                    const double* inv_std, double* sum, double* product_sum);
using NormaliseKernel = void (*)(void* output, const void* input, const ChannelBlock& block,
                                 const double* mean, const double* scale, const double* shift);
using InputGradientKernel = void (*)(void* grad_input, const void* grad_output, const void* input,
                                     const ChannelBlock& block, const double* mean, const double* a,
                                     const double* b, const double* c);

// By the position of the dtype: float32, float64, bfloat16, float16.
struct BatchNormKernels {
  MomentsKernel moments[4];
  BackwardSumsKernel backward_sums[4];
  NormaliseKernel normalise[4];
  InputGradientKernel input_gradient[4];
};

}  // namespace sbp_fast::cpu
