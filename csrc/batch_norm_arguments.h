// The arguments of the batch norm ops, taken off the dispatcher's stack, checked, and brought into
// one order in memory. CPU and CUDA share this; the words are those of
// sbp_fast/ops/checks_batch_norm.py.
#pragma once

#include "batch_norm_layout.h"
#include "op_arguments.h"

namespace sbp_fast {

inline void check_batch(const char* op, const char* name, const TensorView& tensor) {
  check_layout(op, tensor, name);
  STD_TORCH_CHECK(is_gradient_dtype(tensor.dtype), op, ": ", name, " has dtype ",
                  dtype_text(tensor.dtype), "; it must be one of ", kGradientDtypes);
  STD_TORCH_CHECK(tensor.dim >= 2, op, ": ", name, " has shape ",
                  shape_text(tensor.sizes, tensor.dim),
                  "; it must have at least two dimensions, (samples, channels, ...)");
}

inline void check_batch_pair(const char* op, const TensorView& grad_output,
                             const TensorView& input) {
  check_batch(op, "grad_output", grad_output);
  check_batch(op, "input", input);
  STD_TORCH_CHECK(grad_output.dim == input.dim &&
                      std::equal(input.sizes, input.sizes + input.dim, grad_output.sizes),
                  op, ": grad_output has shape ", shape_text(grad_output.sizes, grad_output.dim),
                  " but input has shape ", shape_text(input.sizes, input.dim),
                  "; the shapes must be equal");
  STD_TORCH_CHECK(grad_output.dtype == input.dtype, op, ": grad_output has dtype ",
                  dtype_text(grad_output.dtype), " but input has dtype ", dtype_text(input.dtype),
                  "; they must be equal");
  STD_TORCH_CHECK(same_device(grad_output, input), op, ": grad_output has device ",
                  device_text(grad_output), " but input has device ", device_text(input),
                  "; they must be equal");
}

inline void check_coefficients(const char* op, const TensorView& coefficients, int64_t rows,
                               const TensorView& input) {
  check_layout(op, coefficients, "coefficients");
  const std::array<int64_t, 2> expected{rows, input.sizes[1]};
  STD_TORCH_CHECK(coefficients.dtype == ScalarType::Double && coefficients.dim == 2 &&
                      std::equal(expected.begin(), expected.end(), coefficients.sizes),
                  op, ": coefficients have dtype ", dtype_text(coefficients.dtype), " and shape ",
                  shape_text(coefficients.sizes, coefficients.dim),
                  "; they must be float64 of shape ", shape_text(expected.data(), 2),
                  ", one column per channel");
  STD_TORCH_CHECK(same_device(coefficients, input), op, ": coefficients are on ",
                  device_text(coefficients), " but input is on ", device_text(input),
                  "; all tensors of a call must share one device");
}

// Row after row without gaps.
inline TensorView made_row_major(TensorView coefficients) {
  if (coefficients.contiguous) return coefficients;
  const std::array<int64_t, 2> strides{coefficients.sizes[1], 1};
  AtenTensorHandle copy = nullptr;
  SBP_FAST_CHECK(aoti_torch_empty_strided(
      2, coefficients.sizes, strides.data(), static_cast<int32_t>(ScalarType::Double),
      coefficients.device_type, coefficients.device_index, &copy));
  TensorView result = read_tensor(copy);
  SBP_FAST_CHECK(aoti_torch_copy_(copy, coefficients.handle.get(), /*non_blocking=*/1));
  return result;
}

// After reading, `input` is dense, `grad_output` has its strides, and `coefficients` are row-major;
// each may be a copy of what was passed.
struct BatchNormArguments {
  TensorView grad_output;
  TensorView input;
  TensorView coefficients;
  ChannelExtents extents;
};

inline BatchNormArguments read_batch_norm_statistics(StableIValue* stack) {
  BatchNormArguments arguments;
  arguments.input = read_one_tensor(stack[0]);
  check_batch("batch_norm_statistics", "input", arguments.input);
  arguments.input = made_dense(std::move(arguments.input));
  arguments.extents = channel_extents(arguments.input);
  return arguments;
}

inline BatchNormArguments read_batch_norm_normalise(StableIValue* stack) {
  constexpr const char* op = "batch_norm_normalise";
  BatchNormArguments arguments;
  arguments.input = read_one_tensor(stack[0]);
  arguments.coefficients = read_one_tensor(stack[1]);
  check_batch(op, "input", arguments.input);
  check_coefficients(op, arguments.coefficients, 3, arguments.input);
  arguments.input = made_dense(std::move(arguments.input));
  arguments.coefficients = made_row_major(std::move(arguments.coefficients));
  arguments.extents = channel_extents(arguments.input);
  return arguments;
}

// Both ops of the backward pass take the same arguments, with 2 or 4 rows of coefficients.
inline BatchNormArguments read_batch_norm_backward(const char* op, int64_t rows,
                                                   StableIValue* stack) {
  BatchNormArguments arguments;
  arguments.grad_output = read_one_tensor(stack[0]);
  arguments.input = read_one_tensor(stack[1]);
  arguments.coefficients = read_one_tensor(stack[2]);
  check_batch_pair(op, arguments.grad_output, arguments.input);
  check_coefficients(op, arguments.coefficients, rows, arguments.input);
  arguments.input = made_dense(std::move(arguments.input));
  arguments.grad_output = made_alike(std::move(arguments.grad_output), arguments.input);
  arguments.coefficients = made_row_major(std::move(arguments.coefficients));
  arguments.extents = channel_extents(arguments.input);
  return arguments;
}

}  // namespace sbp_fast
