// The dtypes that the ops know, and the way from a tensor's dtype to a C++ type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "arithmetic.h"

namespace sbp_fast {

using torch::headeronly::ScalarType;

inline int64_t bytes_per_element(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    default: return 2;
  }
}

// Calls function.operator()<T>() with the C++ type of a gradient's or output's dtype.
template <typename Function>
auto with_gradient_type(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float: return function.template operator()<float>();
    case ScalarType::Double: return function.template operator()<double>();
    case ScalarType::BFloat16: return function.template operator()<BFloat16>();
    default: return function.template operator()<Half>();
  }
}

template <typename Function>
auto with_accumulator_type(ScalarType dtype, const Function& function) {
  if (dtype == ScalarType::Float) return function.template operator()<float>();
  return function.template operator()<double>();
}

}  // namespace sbp_fast
