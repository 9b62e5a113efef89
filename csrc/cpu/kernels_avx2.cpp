#include "kernel_table.h"

namespace sbp_fast::cpu {
const KernelTable avx2_kernels = SBP_FAST_KERNEL_TABLE("avx2");
}  // namespace sbp_fast::cpu
