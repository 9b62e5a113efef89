// All kernels of one instruction set: that of the file that includes this.
#pragma once

#include "batch_norm_maps.h"
#include "batch_norm_sums.h"
#include "chunk_kernels.h"
#include "kernels.h"

#define SBP_FAST_MODES(accumulator_t, gradient_t)                         \
  {                                                                       \
    {{accumulate_chunk<false, false, false, accumulator_t, gradient_t>,   \
      accumulate_chunk<false, false, true, accumulator_t, gradient_t>},   \
     {accumulate_chunk<false, true, false, accumulator_t, gradient_t>,    \
      accumulate_chunk<false, true, true, accumulator_t, gradient_t>}},   \
    {                                                                     \
      {accumulate_chunk<true, false, false, accumulator_t, gradient_t>,   \
       accumulate_chunk<true, false, true, accumulator_t, gradient_t>},   \
      {                                                                   \
        accumulate_chunk<true, true, false, accumulator_t, gradient_t>,   \
            accumulate_chunk<true, true, true, accumulator_t, gradient_t> \
      }                                                                   \
    }                                                                     \
  }

#define SBP_FAST_GRADIENT_TYPES(kernel) \
  kernel<float>, kernel<double>, kernel<BFloat16>, kernel<Half>

#define SBP_FAST_KERNEL_TABLE(name)                                         \
  {                                                                         \
      name,                                                                 \
      {{SBP_FAST_MODES(float, float), SBP_FAST_MODES(float, double),        \
        SBP_FAST_MODES(float, BFloat16), SBP_FAST_MODES(float, Half)},      \
       {SBP_FAST_MODES(double, float), SBP_FAST_MODES(double, double),      \
        SBP_FAST_MODES(double, BFloat16), SBP_FAST_MODES(double, Half)}},   \
      {SBP_FAST_GRADIENT_TYPES(statistics_chunk)},                          \
      {{finalise_chunk<float, float>, finalise_chunk<float, double>},       \
       {finalise_chunk<double, float>, finalise_chunk<double, double>},     \
       {finalise_chunk<BFloat16, float>, finalise_chunk<BFloat16, double>}, \
       {finalise_chunk<Half, float>, finalise_chunk<Half, double>}},        \
      {{SBP_FAST_GRADIENT_TYPES(moments_of_block)},                         \
       {SBP_FAST_GRADIENT_TYPES(backward_sums_of_block)},                   \
       {SBP_FAST_GRADIENT_TYPES(normalise_block)},                          \
       {SBP_FAST_GRADIENT_TYPES(input_gradient_block)}},                    \
  }
