// How the samples of a tensor lie in memory, for the layouts that kernels know. A micro-batch is
// read as (outer, samples, inner) in its logical order; an element's index within its sample is
// outer_index * inner + inner_index.
#pragma once

#include <cstdint>

#include "dropout.h"

namespace sbp_fast {

// Contiguous memory: rows of `inner` elements, samples taking turns.
struct DropoutRows {
  int64_t samples;
  int64_t inner;
};

// Sample after sample, position after position, the channels of a position side by side; in the
// logical order a channel's positions follow one another: element = channel * positions + position.
struct DropoutChannelsLast {
  int64_t channels;
  int64_t positions;

  // Of four positions each; the last of a sample may have fewer.
  SBP_FAST_HOST_DEVICE int64_t groups() const {
    return (positions + kDropoutGroup - 1) / kDropoutGroup;
  }
};

}  // namespace sbp_fast
