// What dropout computes, one element at a time. Its mask is a function of step, call, sample and
// element, so that it does not depend on how samples are split, laid out or handed to threads.
#pragma once

#include <cstdint>
#include <type_traits>

#include "philox.h"

namespace sbp_fast {

// Elements that share one block of noise.
inline constexpr int kDropoutGroup = 4;

// The mask of one call, and the factor on what it keeps.
struct DropoutMask {
  PhiloxKey key;
  uint32_t call;
  uint32_t threshold;  // words below it drop
  uint64_t first_sample;
  double scale;
};

// float32 holds the narrow types exactly; the product is rounded once, to the element's own type.
template <typename T>
using DropoutWide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The noise of the elements [4 * group, 4 * group + 4) of a sample, whose index counts from the
// micro-batch's first.
SBP_FAST_HOST_DEVICE PhiloxBlock dropout_noise(const DropoutMask& mask, uint64_t sample,
                                               uint32_t group) {
  const uint64_t index = mask.first_sample + sample;
  return philox(
      {group, mask.call, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32)},
      mask.key);
}

// Dropping is a product with zero, as in torch's own dropout: what is not finite becomes NaN.
template <typename T>
SBP_FAST_HOST_DEVICE T dropout_element(T value, uint32_t word, uint32_t threshold,
                                       DropoutWide<T> scale) {
  const DropoutWide<T> factor = word < threshold ? DropoutWide<T>(0) : scale;
  return static_cast<T>(static_cast<DropoutWide<T>>(value) * factor);
}

}  // namespace sbp_fast
