// The CPU kernels, one table of functions per instruction set. A kernel works on one chunk and
// returns its share of the statistics; who owns which chunk is the business of ops.cpp. Those of
// batch norm work on one block: see batch_norm_kernels.h.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "batch_norm_kernels.h"

namespace sbp_fast::cpu {

// Sums over one chunk. They start at zero and are added up chunk by chunk, in order.
struct ChunkStatistics {
  double sum_squares_in = 0.0;
  double sum_squares_result = 0.0;
  bool non_finite = false;
};

using AccumulateKernel = ChunkStatistics (*)(void* accumulator, const void* gradient, int64_t count,
                                             double scale);
using StatisticsKernel = ChunkStatistics (*)(const void* gradient, int64_t count);
using FinaliseKernel = void (*)(void* output, const void* accumulator, int64_t count,
                                double coefficient);

// Position of a dtype in the tables: float32, float64, bfloat16, float16.
inline constexpr int kAccumulatorDtypeCount = 2;
inline constexpr int kGradientDtypeCount = 4;

inline int dtype_index(torch::headeronly::ScalarType dtype) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float: return 0;
    case torch::headeronly::ScalarType::Double: return 1;
    case torch::headeronly::ScalarType::BFloat16: return 2;
    default: return 3;
  }
}

struct KernelTable {
  const char* instruction_set;
  // [accumulator dtype][gradient dtype][first write][statistics][streaming stores]. Streaming
  // stores bypass the caches: right when the accumulators are larger than those, since a plain
  // store would first read the line that it is about to overwrite.
  AccumulateKernel accumulate[kAccumulatorDtypeCount][kGradientDtypeCount][2][2][2];
  StatisticsKernel statistics[kGradientDtypeCount];
  // [output dtype][accumulator dtype]
  FinaliseKernel finalise[kGradientDtypeCount][kAccumulatorDtypeCount];
  BatchNormKernels batch_norm;
};

extern const KernelTable baseline_kernels;
#ifdef SBP_FAST_X86
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#endif

// The widest instruction set that this processor has. SBP_FAST_CPU_CAPABILITY (baseline, avx2,
// avx512) lowers it, for tests; it never raises it.
const KernelTable& kernels();

}  // namespace sbp_fast::cpu
