#include "dropout_chunk.h"

namespace sbp_fast::cpu {
const DropoutTable avx512_dropout = SBP_FAST_DROPOUT_TABLE("avx512");
}  // namespace sbp_fast::cpu
