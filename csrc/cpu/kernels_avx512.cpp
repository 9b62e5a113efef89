#include "kernel_table.h"

namespace sbp_fast::cpu {
const KernelTable avx512_kernels = SBP_FAST_KERNEL_TABLE("avx512");
}  // namespace sbp_fast::cpu
