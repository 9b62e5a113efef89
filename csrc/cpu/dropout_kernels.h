// The CPU kernels of dropout, a table per instruction set. A kernel works on a part of a tensor;
// who owns which part is the business of dropout.cpp.
#pragma once

#include <cstdint>

#include "../dropout.h"
#include "../dropout_layout.h"
#include "kernels.h"

namespace sbp_fast::cpu {

// Elements [begin, end) of contiguous memory.
using DropoutRowsKernel = void (*)(void* output, const void* input, int64_t begin, int64_t end,
                                   const DropoutRows& rows, const DropoutMask& mask);

// Groups of four positions with all their channels, [begin, end) of all samples' groups.
using DropoutChannelsLastKernel = void (*)(void* output, const void* input, int64_t begin,
                                           int64_t end, const DropoutChannelsLast& layout,
                                           const DropoutMask& mask);

// By dtype, as dtype_index has it.
struct DropoutTable {
  const char* instruction_set;
  DropoutRowsKernel rows[kGradientDtypeCount];
  DropoutChannelsLastKernel channels_last[kGradientDtypeCount];
};

extern const DropoutTable baseline_dropout;
#ifdef SBP_FAST_X86
extern const DropoutTable avx2_dropout;
extern const DropoutTable avx512_dropout;
#endif

}  // namespace sbp_fast::cpu
