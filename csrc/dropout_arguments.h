// The arguments of dropout, taken off the dispatcher's stack and checked, for CPU and CUDA alike.
// The words are those of sbp_fast/ops/checks_dropout.py.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <optional>

#include "dropout_layout.h"
#include "op_arguments.h"

namespace sbp_fast {

struct DropoutArguments {
  torch::stable::Tensor input;
  TensorView view;  // of the input
  int64_t outer = 1;
  int64_t samples = 1;
  double probability = 0.0;
  DropoutMask mask = {};

  DropoutRows rows() const { return {samples, view.numel / (outer * samples)}; }
};

inline DropoutMask make_dropout_mask(int64_t seed, int64_t call, int64_t first_sample,
                                     double probability, ScalarType dtype) {
  DropoutMask mask{};
  const auto key = static_cast<uint64_t>(seed);
  mask.key = {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)}};
  mask.call = static_cast<uint32_t>(call);
  mask.first_sample = static_cast<uint64_t>(first_sample);
  constexpr double kWords = 4294967296.0;
  const double threshold = std::nearbyint(probability * kWords);
  if (threshold < kWords) {
    mask.threshold = static_cast<uint32_t>(threshold);
    // As torch has it: the probability to keep is rounded before it divides.
    const double keep = 1.0 - probability;
    mask.scale = dtype == ScalarType::Double ? 1.0 / keep : 1.0f / static_cast<float>(keep);
  }  // else every word drops, which a factor of zero says as well
  return mask;
}

inline DropoutArguments read_dropout(StableIValue* stack) {
  constexpr const char* op = "dropout";
  DropoutArguments arguments;
  arguments.input = torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
  AtenTensorHandle handle = nullptr;
  SBP_FAST_CHECK(aoti_torch_new_tensor_handle(arguments.input.get(), &handle));
  arguments.view = read_tensor(handle);
  const auto seed = torch::stable::detail::to<int64_t>(stack[1]);
  const auto call = torch::stable::detail::to<int64_t>(stack[2]);
  const auto first_sample = torch::stable::detail::to<int64_t>(stack[3]);
  const auto outer = torch::stable::detail::to<int64_t>(stack[4]);
  const auto samples = torch::stable::detail::to<int64_t>(stack[5]);
  const auto probability = torch::stable::detail::to<double>(stack[6]);
  const TensorView& view = arguments.view;
  check_layout(op, view, "input");
  STD_TORCH_CHECK(is_gradient_dtype(view.dtype), op, ": input has dtype ", dtype_text(view.dtype),
                  "; it must be one of ", kGradientDtypes);
  // Divided one by one: the product of two large factors would overflow.
  STD_TORCH_CHECK(
      outer >= 1 && samples >= 1 && view.numel % outer == 0 && view.numel / outer % samples == 0,
      op, ": input has ", view.numel, " elements, which are not outer=", outer,
      " times samples=", samples, " times a whole number");
  constexpr int64_t kMostElements = int64_t{kDropoutGroup} << 32;
  STD_TORCH_CHECK(view.numel / samples <= kMostElements, op, ": a sample has ",
                  view.numel / samples, " elements; it must have at most ", kMostElements,
                  ", which is what a counter of 32 bits can tell apart");
  constexpr int64_t kMostCalls = int64_t{1} << 32;
  STD_TORCH_CHECK(call >= 0 && call < kMostCalls, op, ": call is ", call, "; it must be from 0 to ",
                  kMostCalls - 1);
  STD_TORCH_CHECK(first_sample >= 0, op, ": first_sample is ", first_sample,
                  "; it must be 0 or more");
  STD_TORCH_CHECK(probability >= 0.0 && probability <= 1.0, op, ": probability is ", probability,
                  "; it must be between 0 and 1");
  arguments.outer = outer;
  arguments.samples = samples;
  arguments.probability = probability;
  arguments.mask = make_dropout_mask(seed, call, first_sample, probability, view.dtype);
  return arguments;
}

// Whether dimensions [first, last) are contiguous among themselves, the innermost one's elements
// `stride` apart.
inline bool are_row_major(const TensorView& view, int64_t first, int64_t last, int64_t stride) {
  for (int64_t d = last; d-- > first;) {
    if (view.sizes[d] > 1 && view.strides[d] != stride) return false;
    stride *= view.sizes[d];
  }
  return true;
}

// The layout where samples come first, one after the other, and each has its channels last.
inline std::optional<DropoutChannelsLast> find_channels_last(const DropoutArguments& arguments) {
  const TensorView& view = arguments.view;
  if (arguments.outer != 1 || view.numel == 0) return std::nullopt;
  int64_t first = 0;  // dimension after those of the samples
  int64_t samples = 1;
  while (samples < arguments.samples) samples *= view.sizes[first++];
  const int64_t inner = view.numel / samples;
  if (samples != arguments.samples || !are_row_major(view, 0, first, inner)) return std::nullopt;
  int64_t channels = 1;
  for (int64_t split = first; split < view.dim; ++split) {
    channels *= view.sizes[split];
    if (are_row_major(view, first, split + 1, 1) &&
        are_row_major(view, split + 1, view.dim, channels)) {
      return DropoutChannelsLast{channels, inner / channels};
    }
  }
  return std::nullopt;
}

}  // namespace sbp_fast
