#include "kernel_table.h"

namespace sbp_fast::cpu {
const KernelTable baseline_kernels = SBP_FAST_KERNEL_TABLE("baseline");
}  // namespace sbp_fast::cpu
