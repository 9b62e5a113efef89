// The batch norm ops on CUDA tensors.
#include "../batch_norm_arguments.h"
#include "batch_norm.cuh"
#include "call.h"

namespace sbp_fast::cuda {
namespace {

bool begins_aligned(const TensorView& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data<void>()) % kVectorBytes == 0;
}

// Calls launch.operator()<kPlanes, kWidth, T>(cut) with the widest vectors that fit, unless there
// is nothing to do. `aligned` tells whether all tensors begin on a 16-byte boundary.
template <typename Launch>
void with_walk(const BatchNormArguments& arguments, bool aligned, const Launch& launch) {
  if (arguments.input.numel == 0) return;
  const ChannelExtents& extents = arguments.extents;
  const bool planes = extents.inner > 1;
  with_gradient_type(arguments.input.dtype, [&]<typename T>() {
    constexpr int kVector = kVectorWidth<T, T>;
    const auto cut = [&](int width, int loads) {
      return cut_channels(extents.outer, extents.channels, extents.inner, width, kThreads, loads);
    };
    if (aligned && (planes ? extents.inner : extents.channels) % kVector == 0) {
      const ChannelCut vectors = cut(kVector, kLoads<kVector>);
      planes ? launch.template operator()<true, kVector, T>(vectors)
             : launch.template operator()<false, kVector, T>(vectors);
    } else {
      const ChannelCut elements = cut(1, kLoads<1>);
      planes ? launch.template operator()<true, 1, T>(elements)
             : launch.template operator()<false, 1, T>(elements);
    }
  });
}

// The two rows that an op returns, and room for the shares of blocks: in these rows themselves
// where every channel has but one chunk, else aside, to be merged.
template <typename State>
class Shares {
 public:
  Shares(const Device& device, const TensorView& input)
      : device_(device), channels_(input.sizes[1]), results_(new_sums(input)) {}

  void reserve(int64_t chunks) {
    chunks_ = chunks;
    if (chunks_ == 1) return;
    aside_.emplace(
        device_.empty(State::kRows * chunks_ * channels_ * static_cast<int64_t>(sizeof(double))));
  }

  int rows() const { return aside_ ? State::kRows : 2; }
  double* data() const {
    return aside_ ? static_cast<double*>(aside_->mutable_data_ptr())
                  : results_.template mutable_data<double>();
  }

  // Without any chunk all sums are zero.
  TensorView merged() && {
    if (chunks_ != 1 && channels_ > 0) {
      device_.launch("merge_chunks", merge_chunks<State>,
                     quotient_up(channels_, std::min(channels_, kMostLanes)),
                     static_cast<const double*>(data()), chunks_, channels_,
                     results_.template mutable_data<double>());
    }
    return std::move(results_);
  }

 private:
  const Device& device_;
  int64_t channels_;
  TensorView results_;
  int64_t chunks_ = 0;
  std::optional<torch::stable::Tensor> aside_;
};

void statistics(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments = read_batch_norm_statistics(stack);
  const TensorView& input = arguments.input;
  const Device device(input);
  Shares<ChannelMoments<1>> shares(device, input);
  with_walk(arguments, begins_aligned(input),
            [&]<bool kPlanes, int kWidth, typename T>(const ChannelCut& cut) {
              shares.reserve(cut.chunks);
              device.launch("batch_norm_statistics", batch_norm_statistics<kPlanes, kWidth, T>,
                            cut.blocks(), input.const_data<T>(), cut, shares.rows(), shares.data());
            });
  return_tensor(stack, std::move(shares).merged());
}

void normalise(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments = read_batch_norm_normalise(stack);
  const TensorView& input = arguments.input;
  const Device device(input);
  TensorView output = new_like(input);
  with_walk(arguments, begins_aligned(input) && begins_aligned(output),
            [&]<bool kPlanes, int kWidth, typename T>(const ChannelCut& cut) {
              device.launch("batch_norm_normalise", batch_norm_normalise<kPlanes, kWidth, T>,
                            cut.blocks(), input.const_data<T>(),
                            arguments.coefficients.const_data<double>(), cut,
                            output.mutable_data<T>());
            });
  return_tensor(stack, std::move(output));
}

void backward_statistics(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments =
      read_batch_norm_backward("batch_norm_backward_statistics", 2, stack);
  const TensorView& input = arguments.input;
  const TensorView& grad_output = arguments.grad_output;
  const Device device(input);
  Shares<ChannelSums<1>> shares(device, input);
  with_walk(arguments, begins_aligned(input) && begins_aligned(grad_output),
            [&]<bool kPlanes, int kWidth, typename T>(const ChannelCut& cut) {
              shares.reserve(cut.chunks);
              device.launch("batch_norm_backward_statistics",
                            batch_norm_backward_statistics<kPlanes, kWidth, T>, cut.blocks(),
                            grad_output.const_data<T>(), input.const_data<T>(),
                            arguments.coefficients.const_data<double>(), cut, shares.rows(),
                            shares.data());
            });
  return_tensor(stack, std::move(shares).merged());
}

void backward_apply(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments =
      read_batch_norm_backward("batch_norm_backward_apply", 4, stack);
  const TensorView& input = arguments.input;
  const TensorView& grad_output = arguments.grad_output;
  const Device device(input);
  TensorView output = new_like(input);
  with_walk(
      arguments, begins_aligned(input) && begins_aligned(grad_output) && begins_aligned(output),
      [&]<bool kPlanes, int kWidth, typename T>(const ChannelCut& cut) {
        device.launch("batch_norm_backward_apply", batch_norm_backward_apply<kPlanes, kWidth, T>,
                      cut.blocks(), grad_output.const_data<T>(), input.const_data<T>(),
                      arguments.coefficients.const_data<double>(), cut, output.mutable_data<T>());
      });
  return_tensor(stack, std::move(output));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CUDA, library) {
  library.impl("batch_norm_statistics", &statistics);
  library.impl("batch_norm_normalise", &normalise);
  library.impl("batch_norm_backward_statistics", &backward_statistics);
  library.impl("batch_norm_backward_apply", &backward_apply);
}

}  // namespace sbp_fast::cuda
