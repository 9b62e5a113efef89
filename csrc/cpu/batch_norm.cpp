// The batch norm ops on CPU tensors: a tensor is cut into blocks by its extents alone, and partial
// statistics are merged in the blocks' order, so that results do not depend on threads.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "../batch_norm_arguments.h"
#include "kernels.h"
#include "parallel.h"

namespace sbp_fast::cpu {
namespace {

// Enough work to be worth handing out, few enough elements for the second cache to hold.
constexpr int64_t kBlockElements = 16384;
// Neighbouring channels are taken together until their runs make stretches of memory this long, in
// elements: several cache lines, whose neighbours the processor fetches unasked.
constexpr int64_t kStretchElements = 512;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One dimension in pieces of equal size, the last of what remains.
struct Cut {
  int64_t size;
  int64_t step;

  Cut(int64_t size, int64_t most) : size(size), step(divide_up(size, divide_up(size, most))) {}
  int64_t pieces() const { return divide_up(size, step); }
  int64_t begin(int64_t piece) const { return piece * step; }
  int64_t count(int64_t piece) const { return std::min(step, size - piece * step); }
};

struct Block {
  int64_t offset;  // of its first element
  int64_t first_channel;
  int64_t part;  // of these channels: which part of their samples
  ChannelBlock shape;
};

class Blocks {
 public:
  explicit Blocks(const ChannelExtents& extents)
      : extents_(extents),
        inner_(extents.inner, kBlockElements),
        outer_(extents.outer, most_outer(extents)),
        channels_(extents.channels, most_channels(extents)) {}

  int64_t size() const { return parts() * channels_.pieces(); }
  // Into how many parts each channel's samples are cut, and how many each has.
  int64_t parts() const { return outer_.pieces() * inner_.pieces(); }
  int64_t samples(int64_t part) const {
    return outer_.count(part / inner_.pieces()) * inner_.count(part % inner_.pieces());
  }

  Block operator[](int64_t index) const {
    const int64_t inner = index % inner_.pieces();
    const int64_t channels = index / inner_.pieces() % channels_.pieces();
    const int64_t outer = index / inner_.pieces() / channels_.pieces();
    const int64_t outer_stride = extents_.channels * extents_.inner;
    const int64_t first = channels_.begin(channels);
    return {outer_.begin(outer) * outer_stride + first * extents_.inner + inner_.begin(inner),
            first,
            outer * inner_.pieces() + inner,
            {outer_.count(outer), outer_stride, channels_.count(channels), extents_.inner,
             inner_.count(inner)}};
  }

 private:
  static int64_t most_outer(const ChannelExtents& extents) {
    const int64_t together =
        std::clamp(kStretchElements / extents.inner, int64_t{1}, extents.channels);
    return std::clamp(kBlockElements / (together * extents.inner), int64_t{1}, extents.outer);
  }
  static int64_t most_channels(const ChannelExtents& extents) {
    return std::clamp(kBlockElements / (most_outer(extents) * extents.inner), int64_t{1},
                      extents.channels);
  }

  ChannelExtents extents_;
  Cut inner_;
  Cut outer_;
  Cut channels_;
};

// Rows of one double per channel, from each part of the samples.
class Partials {
 public:
  Partials(const Blocks& blocks, int64_t rows, int64_t channels)
      : rows_(rows),
        channels_(channels),
        memory_(std::make_unique_for_overwrite<double[]>(blocks.parts() * rows * channels)) {}

  double* row(int64_t part, int64_t row) const {
    return memory_.get() + (part * rows_ + row) * channels_;
  }
  MomentRows moments(int64_t part, int64_t first_channel) const {
    return {row(part, 0) + first_channel, row(part, 1) + first_channel,
            row(part, 2) + first_channel};
  }

 private:
  int64_t rows_;
  int64_t channels_;
  std::unique_ptr<double[]> memory_;
};

// The mean of the parts' means and, by their distances from it, the sum of squares. All are taken
// from the first part's pivot: numbers as small as the samples' spread.
void merge_moments(const Partials& partials, const Blocks& blocks, int64_t channels, double* mean,
                   double* m2) {
  const double* origin = partials.row(0, 0);
  double* distance = mean;  // of the mean, until the last loop
  std::fill_n(distance, channels, 0.0);
  std::fill_n(m2, channels, 0.0);
  double total = 0.0;
  for (int64_t part = 0; part < blocks.parts(); ++part) {
    total += static_cast<double>(blocks.samples(part));
  }
  for (int64_t part = 0; part < blocks.parts(); ++part) {
    const double weight = static_cast<double>(blocks.samples(part)) / total;
    const MomentRows rows = partials.moments(part, 0);
    for (int64_t channel = 0; channel < channels; ++channel) {
      rows.distance[channel] += rows.pivot[channel] - origin[channel];
      distance[channel] += weight * rows.distance[channel];
    }
  }
  for (int64_t part = 0; part < blocks.parts(); ++part) {
    const auto samples = static_cast<double>(blocks.samples(part));
    const MomentRows rows = partials.moments(part, 0);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const double apart = rows.distance[channel] - distance[channel];
      m2[channel] += rows.m2[channel] + samples * (apart * apart);
    }
  }
  for (int64_t channel = 0; channel < channels; ++channel) mean[channel] += origin[channel];
}

void add_up(const Partials& partials, const Blocks& blocks, int64_t numbers, double* sums) {
  std::fill_n(sums, numbers, 0.0);
  for (int64_t part = 0; part < blocks.parts(); ++part) {
    const double* partial = partials.row(part, 0);
    for (int64_t i = 0; i < numbers; ++i) sums[i] += partial[i];
  }
}

// An empty batch has no statistics: zeros, which change nothing when they are merged with others.
TensorView zero_sums(TensorView sums) {
  std::fill_n(sums.mutable_data<double>(), sums.numel, 0.0);
  return sums;
}

template <typename Process>
void for_each_block(const Blocks& blocks, const ChannelExtents& extents, Process process) {
  for_each_in_parallel(blocks.size(), 1, extents.numel(), [&](int64_t i) { process(blocks[i]); });
}

void batch_norm_statistics(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments = read_batch_norm_statistics(stack);
  const ChannelExtents& extents = arguments.extents;
  TensorView result = new_sums(arguments.input);
  if (arguments.input.numel == 0) return return_tensor(stack, zero_sums(std::move(result)));

  const MomentsKernel kernel = kernels().batch_norm.moments[dtype_index(arguments.input.dtype)];
  const int64_t bytes = bytes_per_element(arguments.input.dtype);
  const char* input = arguments.input.const_data<char>();
  const Blocks blocks(extents);
  const Partials partials(blocks, 3, extents.channels);
  for_each_block(blocks, extents, [&](const Block& block) {
    kernel(input + block.offset * bytes, block.shape,
           partials.moments(block.part, block.first_channel));
  });
  double* mean = result.mutable_data<double>();
  merge_moments(partials, blocks, extents.channels, mean, mean + extents.channels);
  return_tensor(stack, std::move(result));
}

void batch_norm_normalise(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments = read_batch_norm_normalise(stack);
  const ChannelExtents& extents = arguments.extents;
  TensorView result = new_like(arguments.input);
  if (result.numel == 0) return return_tensor(stack, std::move(result));

  const NormaliseKernel kernel = kernels().batch_norm.normalise[dtype_index(result.dtype)];
  const int64_t bytes = bytes_per_element(result.dtype);
  char* output = result.mutable_data<char>();
  const char* input = arguments.input.const_data<char>();
  const double* mean = arguments.coefficients.const_data<double>();
  const double* scale = mean + extents.channels;
  const double* shift = scale + extents.channels;
  for_each_block(Blocks(extents), extents, [&](const Block& block) {
    const int64_t at = block.offset * bytes;
    const int64_t first = block.first_channel;
    kernel(output + at, input + at, block.shape, mean + first, scale + first, shift + first);
  });
  return_tensor(stack, std::move(result));
}

void batch_norm_backward_statistics(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments =
      read_batch_norm_backward("batch_norm_backward_statistics", 2, stack);
  const ChannelExtents& extents = arguments.extents;
  TensorView result = new_sums(arguments.input);
  if (arguments.input.numel == 0) return return_tensor(stack, zero_sums(std::move(result)));

  const BackwardSumsKernel kernel =
      kernels().batch_norm.backward_sums[dtype_index(arguments.input.dtype)];
  const int64_t bytes = bytes_per_element(arguments.input.dtype);
  const char* grad_output = arguments.grad_output.const_data<char>();
  const char* input = arguments.input.const_data<char>();
  const double* mean = arguments.coefficients.const_data<double>();
  const double* inv_std = mean + extents.channels;
  const Blocks blocks(extents);
  const Partials partials(blocks, 2, extents.channels);
  for_each_block(blocks, extents, [&](const Block& block) {
    const int64_t at = block.offset * bytes;
    const int64_t first = block.first_channel;
    kernel(grad_output + at, input + at, block.shape, mean + first, inv_std + first,
           partials.row(block.part, 0) + first, partials.row(block.part, 1) + first);
  });
  add_up(partials, blocks, result.numel, result.mutable_data<double>());
  return_tensor(stack, std::move(result));
}

void batch_norm_backward_apply(StableIValue* stack, uint64_t, uint64_t) {
  const BatchNormArguments arguments =
      read_batch_norm_backward("batch_norm_backward_apply", 4, stack);
  const ChannelExtents& extents = arguments.extents;
  TensorView result = new_like(arguments.input);
  if (result.numel == 0) return return_tensor(stack, std::move(result));

  const InputGradientKernel kernel = kernels().batch_norm.input_gradient[dtype_index(result.dtype)];
  const int64_t bytes = bytes_per_element(result.dtype);
  char* grad_input = result.mutable_data<char>();
  const char* grad_output = arguments.grad_output.const_data<char>();
  const char* input = arguments.input.const_data<char>();
  const double* mean = arguments.coefficients.const_data<double>();
  const double* a = mean + extents.channels;
  const double* b = a + extents.channels;
  const double* c = b + extents.channels;
  for_each_block(Blocks(extents), extents, [&](const Block& block) {
    const int64_t at = block.offset * bytes;
    const int64_t first = block.first_channel;
    kernel(grad_input + at, grad_output + at, input + at, block.shape, mean + first, a + first,
           b + first, c + first);
  });
  return_tensor(stack, std::move(result));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CPU, library) {
  library.impl("batch_norm_statistics", &batch_norm_statistics);
  library.impl("batch_norm_normalise", &batch_norm_normalise);
  library.impl("batch_norm_backward_statistics", &batch_norm_backward_statistics);
  library.impl("batch_norm_backward_apply", &batch_norm_backward_apply);
}

}  // namespace sbp_fast::cpu
