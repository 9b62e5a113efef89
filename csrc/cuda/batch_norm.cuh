// The kernels of batch norm. A block takes one chunk of one channel (planes) or of the channels
// that lie side by side in a vector's width times its lanes.
#pragma once

#include "channel_sums.cuh"

namespace sbp_fast::cuda {

template <bool kPlanes, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksOfChannels<kPlanes, kWidth>)
    batch_norm_statistics(const T* input, ChannelCut cut, int rows, double* partials) {
  const Place<kPlanes, kWidth> place(cut);
  ChannelMoments<kChannels<kPlanes, kWidth>> mine;
  walk_channels(cut, place, [&]<int kCount>(const int64_t (&at)[kCount]) {
    Vector<T, kWidth> loaded[kCount];
    for (int k = 0; k < kCount; ++k) loaded[k] = vectors_of<kWidth>(input)[at[k]];
    if constexpr (kPlanes) {
      mine.add(kCount * kWidth, [&](int) {
        Computed<T> values[kCount * kWidth];
        for (int k = 0; k < kCount * kWidth; ++k) {
          values[k] = static_cast<Computed<T>>(loaded[k / kWidth].values[k % kWidth]);
        }
        return moments_of(values);
      });
    } else {
      mine.add(kCount, [&](int channel) {
        Computed<T> values[kCount];
        for (int k = 0; k < kCount; ++k) {
          values[k] = static_cast<Computed<T>>(loaded[k].values[channel]);
        }
        return moments_of(values);
      });
    }
  });
  write_share(mine, cut, place, rows, partials);
}

// Coefficients of a thread's channels: row after row of float64 in memory, in registers as the
// kernel computes. The mean is rounded; addends make up for it.
template <int kCount, typename T>
struct Coefficients {
  const double* from;
  int64_t channels;
  T means[kCount];

  __device__ __forceinline__ Coefficients(const double* coefficients, int64_t channels,
                                          int64_t first, bool active)
      : from(active ? coefficients + first : coefficients), channels(channels) {
    for (int channel = 0; channel < kCount; ++channel) {
      means[channel] = static_cast<T>(from[channel]);
    }
  }

  __device__ __forceinline__ double exact(int row, int channel) const {
    return from[row * channels + channel];
  }

  // The addend of row `addend` to distances from the mean that are multiplied by row `factor`.
  __device__ __forceinline__ T addend(int row, int factor, int channel) const {
    return static_cast<T>(corrected_addend(exact(0, channel), static_cast<double>(means[channel]),
                                           exact(factor, channel), exact(row, channel)));
  }
};

template <bool kPlanes, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksOfChannels<kPlanes, kWidth>)
    batch_norm_backward_statistics(const T* grad_output, const T* input, const double* coefficients,
                                   ChannelCut cut, int rows, double* partials) {
  constexpr int kCoefficients = kChannels<kPlanes, kWidth>;
  const Place<kPlanes, kWidth> place(cut);
  const Coefficients<kCoefficients, Computed<T>> known(coefficients, cut.channels, place.channel,
                                                       place.active);
  ChannelSums<kCoefficients> mine;
  walk_channels(cut, place, [&]<int kCount>(const int64_t (&at)[kCount]) {
    Vector<T, kWidth> gradients[kCount];
    Vector<T, kWidth> inputs[kCount];
    for (int k = 0; k < kCount; ++k) gradients[k] = vectors_of<kWidth>(grad_output)[at[k]];
    for (int k = 0; k < kCount; ++k) inputs[k] = vectors_of<kWidth>(input)[at[k]];
    Computed<T> sums[kCoefficients] = {};
    Computed<T> products[kCoefficients] = {};
    for (int k = 0; k < kCount; ++k) {
      for (int i = 0; i < kWidth; ++i) {
        const int channel = kPlanes ? 0 : i;
        const auto dy = static_cast<Computed<T>>(gradients[k].values[i]);
        const auto x = static_cast<Computed<T>>(inputs[k].values[i]);
        sums[channel] += dy;
        products[channel] += dy * (x - known.means[channel]);
      }
    }
    for (int channel = 0; channel < kCoefficients; ++channel) {
      mine.numbers[channel] += sums[channel];
      mine.numbers[kCoefficients + channel] += products[channel];
    }
  });
  for (int channel = 0; channel < kCoefficients; ++channel) {
    double& product = mine.numbers[kCoefficients + channel];
    product = corrected_addend(known.exact(0, channel), known.means[channel], mine.numbers[channel],
                               product) *
              known.exact(1, channel);
  }
  write_share(mine, cut, place, rows, partials);
}

template <bool kPlanes, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksOfChannels<kPlanes, kWidth>)
    batch_norm_normalise(const T* input, const double* coefficients, ChannelCut cut, T* output) {
  constexpr int kCoefficients = kChannels<kPlanes, kWidth>;
  const Place<kPlanes, kWidth> place(cut);
  const Coefficients<kCoefficients, Computed<T>> known(coefficients, cut.channels, place.channel,
                                                       place.active);
  Computed<T> scales[kCoefficients];
  Computed<T> shifts[kCoefficients];
  for (int channel = 0; channel < kCoefficients; ++channel) {
    scales[channel] = static_cast<Computed<T>>(known.exact(1, channel));
    shifts[channel] = known.addend(2, 1, channel);
  }
  walk_channels(cut, place, [&]<int kCount>(const int64_t (&at)[kCount]) {
    Vector<T, kWidth> loaded[kCount];
    for (int k = 0; k < kCount; ++k) loaded[k] = vectors_of<kWidth>(input)[at[k]];
    for (int k = 0; k < kCount; ++k) {
      Vector<T, kWidth> result;
      for (int i = 0; i < kWidth; ++i) {
        const int channel = kPlanes ? 0 : i;
        const auto x = static_cast<Computed<T>>(loaded[k].values[i]);
        result.values[i] = static_cast<T>(
            sbp_fast::normalise(x, known.means[channel], scales[channel], shifts[channel]));
      }
      vectors_of<kWidth>(output)[at[k]] = result;
    }
  });
}

template <bool kPlanes, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads, kBlocksOfChannels<kPlanes, kWidth>)
    batch_norm_backward_apply(const T* grad_output, const T* input, const double* coefficients,
                              ChannelCut cut, T* output) {
  constexpr int kCoefficients = kChannels<kPlanes, kWidth>;
  const Place<kPlanes, kWidth> place(cut);
  const Coefficients<kCoefficients, Computed<T>> known(coefficients, cut.channels, place.channel,
                                                       place.active);
  Computed<T> a[kCoefficients];
  Computed<T> b[kCoefficients];
  Computed<T> c[kCoefficients];
  for (int channel = 0; channel < kCoefficients; ++channel) {
    a[channel] = static_cast<Computed<T>>(known.exact(1, channel));
    b[channel] = static_cast<Computed<T>>(known.exact(2, channel));
    c[channel] = known.addend(3, 2, channel);
  }
  walk_channels(cut, place, [&]<int kCount>(const int64_t (&at)[kCount]) {
    Vector<T, kWidth> gradients[kCount];
    Vector<T, kWidth> inputs[kCount];
    for (int k = 0; k < kCount; ++k) gradients[k] = vectors_of<kWidth>(grad_output)[at[k]];
    for (int k = 0; k < kCount; ++k) inputs[k] = vectors_of<kWidth>(input)[at[k]];
    for (int k = 0; k < kCount; ++k) {
      Vector<T, kWidth> result;
      for (int i = 0; i < kWidth; ++i) {
        const int channel = kPlanes ? 0 : i;
        const auto dy = static_cast<Computed<T>>(gradients[k].values[i]);
        const auto x = static_cast<Computed<T>>(inputs[k].values[i]);
        result.values[i] = static_cast<T>(
            gradient_of_input(dy, x, known.means[channel], a[channel], b[channel], c[channel]));
      }
      vectors_of<kWidth>(output)[at[k]] = result;
    }
  });
}

}  // namespace sbp_fast::cuda
