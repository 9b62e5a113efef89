#include "dropout_chunk.h"

namespace sbp_fast::cpu {
const DropoutTable baseline_dropout = SBP_FAST_DROPOUT_TABLE("baseline");
}  // namespace sbp_fast::cpu
