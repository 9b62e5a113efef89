#include "dropout_chunk.h"

namespace sbp_fast::cpu {
const DropoutTable avx2_dropout = SBP_FAST_DROPOUT_TABLE("avx2");
}  // namespace sbp_fast::cpu
