#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace sbp_fast::cpu {
namespace {

const KernelTable& choose() {
#ifdef SBP_FAST_X86
  const char* requested = std::getenv("SBP_FAST_CPU_CAPABILITY");
  const auto allows = [&](const char* name) {
    return requested == nullptr || std::strcmp(requested, name) == 0;
  };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allows("avx512")) return avx512_kernels;
  if (has_avx2 && (allows("avx2") || allows("avx512"))) return avx2_kernels;
#endif
  return baseline_kernels;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& chosen = choose();
  return chosen;
}

}  // namespace sbp_fast::cpu
