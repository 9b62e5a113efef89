// One call of dropout: which layout goes to which kernel, the same on CPU and CUDA.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "dropout_arguments.h"

namespace sbp_fast {

// `rows(to, from, arguments)` computes on contiguous memory, `channels_last(to, from, arguments,
// layout)` on that layout; `to` may be `from`. Any other layout is copied into contiguous memory.
template <typename Rows, typename ChannelsLast>
void call_dropout(StableIValue* stack, const Rows& rows, const ChannelsLast& channels_last) {
  const DropoutArguments arguments = read_dropout(stack);
  const TensorView& view = arguments.view;
  torch::stable::Tensor output = torch::stable::empty_like(arguments.input);
  if (arguments.probability == 0.0) {
    torch::stable::copy_(output, arguments.input);
  } else if (view.numel == 0) {
    // Nothing to compute.
  } else if (view.contiguous) {
    rows(output.mutable_data_ptr(), view.const_data<void>(), arguments);
  } else if (const auto layout = find_channels_last(arguments)) {
    channels_last(output.mutable_data_ptr(), view.const_data<void>(), arguments, *layout);
  } else {
    torch::stable::Tensor copy = torch::stable::contiguous(arguments.input);
    void* data = copy.mutable_data_ptr();
    rows(data, data, arguments);
    torch::stable::copy_(output, copy);
  }
  stack[0] = torch::stable::detail::from(output);
}

}  // namespace sbp_fast
