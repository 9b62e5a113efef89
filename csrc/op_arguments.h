// The arguments of each op, taken off the dispatcher's stack and checked. CPU and CUDA share this,
// so that a call is refused for the same reasons with the same words on both, before anything is
// written.
#pragma once

#include <utility>

#include "tensor_list.h"

namespace sbp_fast {

inline TensorView read_one_tensor(StableIValue argument) {
  return read_tensor(torch::stable::detail::to<AtenTensorHandle>(argument));
}

inline std::optional<TensorView> read_optional_tensor(StableIValue argument) {
  auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(argument);
  if (!handle.has_value()) return std::nullopt;
  return read_tensor(*handle);
}

struct ScaleAccumulateArguments {
  TensorViews accumulators;
  TensorViews gradients;
  double scale = 1.0;
  bool first_write = false;
  std::optional<TensorView> statistics;
};

inline ScaleAccumulateArguments read_scale_accumulate(StableIValue* stack) {
  constexpr const char* op = "scale_accumulate_";
  ScaleAccumulateArguments arguments;
  arguments.accumulators = read_tensors(stack[0]);
  arguments.gradients = read_tensors(stack[1]);
  arguments.scale = torch::stable::detail::to<double>(stack[2]);
  arguments.first_write = torch::stable::detail::to<bool>(stack[3]);
  arguments.statistics = read_optional_tensor(stack[4]);
  check_pairs(op, "accumulators", arguments.accumulators, "gradients", arguments.gradients);
  check_dtypes(op, "accumulators", arguments.accumulators, is_accumulator_dtype,
               kAccumulatorDtypes);
  check_dtypes(op, "gradients", arguments.gradients, is_gradient_dtype, kGradientDtypes);
  check_written(op, "accumulators", arguments.accumulators);
  check_separate(op, "accumulators", arguments.accumulators, "gradients", arguments.gradients);
  if (arguments.statistics) check_statistics(op, *arguments.statistics, arguments.accumulators);
  return arguments;
}

struct GradientStatisticsArguments {
  TensorViews gradients;
  TensorView statistics;
};

inline GradientStatisticsArguments read_gradient_statistics(StableIValue* stack) {
  constexpr const char* op = "gradient_statistics_";
  GradientStatisticsArguments arguments;
  arguments.gradients = read_tensors(stack[0]);
  arguments.statistics = read_one_tensor(stack[1]);
  check_dtypes(op, "gradients", arguments.gradients, is_gradient_dtype, kGradientDtypes);
  if (!arguments.gradients.empty()) {
    check_one_device(op, "gradients", arguments.gradients, "gradients", arguments.gradients[0]);
  }
  check_statistics(op, arguments.statistics, arguments.gradients);
  return arguments;
}

struct FinaliseArguments {
  TensorViews outputs;
  TensorViews accumulators;
  TensorView scale;
  std::optional<TensorView> norm;
  std::optional<double> max_norm;
};

inline FinaliseArguments read_finalise(StableIValue* stack) {
  constexpr const char* op = "finalise_";
  FinaliseArguments arguments;
  arguments.outputs = read_tensors(stack[0]);
  arguments.accumulators = read_tensors(stack[1]);
  arguments.scale = read_one_tensor(stack[2]);
  arguments.norm = read_optional_tensor(stack[3]);
  arguments.max_norm = torch::stable::detail::to<std::optional<double>>(stack[4]);
  check_pairs(op, "outputs", arguments.outputs, "accumulators", arguments.accumulators);
  check_dtypes(op, "outputs", arguments.outputs, is_gradient_dtype, kGradientDtypes);
  check_dtypes(op, "accumulators", arguments.accumulators, is_accumulator_dtype,
               kAccumulatorDtypes);
  check_written(op, "outputs", arguments.outputs);
  check_separate(op, "outputs", arguments.outputs, "accumulators", arguments.accumulators);
  check_scalar(op, "scale", arguments.scale, arguments.accumulators);
  STD_TORCH_CHECK(arguments.norm.has_value() == arguments.max_norm.has_value(), op,
                  ": norm and max_norm go together, got ",
                  arguments.norm ? "a norm and no max_norm" : "a max_norm and no norm",
                  "; give both to clip, neither not to");
  if (arguments.norm) {
    check_scalar(op, "norm", *arguments.norm, arguments.accumulators);
    STD_TORCH_CHECK(*arguments.max_norm > 0, op, ": max_norm is ", *arguments.max_norm,
                    "; it must be greater than 0");
  }
  return arguments;
}

}  // namespace sbp_fast
