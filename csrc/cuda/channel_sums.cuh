// Statistics of channels: what a thread collects, how the threads of a block put theirs together,
// and how those of a channel's chunks are. Always in the same order: the same call gives the same
// bits every time.
#pragma once

#include <type_traits>

#include "../batch_norm_arithmetic.h"
#include "channel_walk.cuh"

namespace sbp_fast::cuda {

// Narrow types are computed in as float32.
template <typename T>
using Computed = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A mean, and the sum of squared distances from it.
struct MeanAndM2 {
  double mean;
  double m2;
};

// Means and M2 of kCount channels, over equally many elements of each.
template <int kCount>
struct ChannelMoments {
  static constexpr int kRows = 3;  // mean, M2, number of elements
  static constexpr int kNumbers = 2 * kCount + 1;
  double numbers[kNumbers] = {};

  __device__ __forceinline__ double at(int row, int channel) const {
    return row == 2 ? numbers[2 * kCount] : numbers[row * kCount + channel];
  }

  // T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for computing the sample variance", The
  // American Statistician 37(3), 1983, formulae 2.1. `of(channel)` gives those of `added`
  // elements.
  template <typename Of>
  __device__ __forceinline__ void add(double added, const Of& of) {
    const double count = numbers[2 * kCount];
    const double total = count + added;
    const double share = added / total;
    for (int channel = 0; channel < kCount; ++channel) {
      const MeanAndM2 moments = of(channel);
      double& mean = numbers[channel];
      const double delta = moments.mean - mean;
      // An infinite mean stays one, where its distances would make it NaN.
      mean = is_non_finite(delta) ? mean + moments.mean : mean + delta * share;
      numbers[kCount + channel] += moments.m2 + delta * delta * (count * share);
    }
    numbers[2 * kCount] = total;
  }

  __device__ __forceinline__ void merge(const ChannelMoments& other) {
    const double added = other.numbers[2 * kCount];
    if (added == 0.0) return;
    add(added, [&](int channel) {
      return MeanAndM2{other.numbers[channel], other.numbers[kCount + channel]};
    });
  }
};

// The moments of values that lie in registers. Their distances are from a mean that rounding may
// have left a little off.
template <int kCount, typename T>
__device__ __forceinline__ MeanAndM2 moments_of(const T (&values)[kCount]) {
  T sum(0);
  for (int k = 0; k < kCount; ++k) sum += values[k];
  const T near = sum * (T(1) / kCount);
  const T pivot = is_non_finite(near) ? T(0) : near;
  T distances(0);
  T squares(0);
  for (int k = 0; k < kCount; ++k) {
    const T distance = values[k] - pivot;
    distances += distance;
    squares += distance * distance;
  }
  const Moments about = moments_about_pivot(distances, squares, kCount);
  return {pivot + about.distance, about.m2};
}

// Two plain sums for each of kCount channels.
template <int kCount>
struct ChannelSums {
  static constexpr int kRows = 2;
  static constexpr int kNumbers = 2 * kCount;
  double numbers[kNumbers] = {};

  __device__ __forceinline__ double at(int row, int channel) const {
    return numbers[row * kCount + channel];
  }

  __device__ __forceinline__ void merge(const ChannelSums& other) {
    for (int k = 0; k < kNumbers; ++k) numbers[k] += other.numbers[k];
  }
};

// Leaves with group 0 of every lane what all its groups have. All threads must call it, once per
// launch: the shared memory is not guarded against a second round.
template <typename State>
__device__ __forceinline__ void merge_groups(State& mine, int lane, int lanes, int group,
                                             int groups) {
  __shared__ double shared[State::kNumbers][kThreads / 2];
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    if (group >= half && group < left) {
      for (int k = 0; k < State::kNumbers; ++k) {
        shared[k][(group - half) * lanes + lane] = mine.numbers[k];
      }
    }
    __syncthreads();
    if (group + half < left) {
      State other;
      for (int k = 0; k < State::kNumbers; ++k) other.numbers[k] = shared[k][group * lanes + lane];
      mine.merge(other);
    }
    __syncthreads();
    left = half;
  }
}

// Adds up a block's share and leaves it at partials[row][chunk][channel]; only the first `rows` are
// wanted.
template <bool kPlanes, int kWidth, typename State>
__device__ __forceinline__ void write_share(State& mine, const ChannelCut& cut,
                                            const Place<kPlanes, kWidth>& place, int rows,
                                            double* partials) {
  merge_groups(mine, place.lane, place.lanes, place.group, place.groups);
  if (place.group != 0 || !place.active) return;
  for (int row = 0; row < State::kRows; ++row) {
    if (row >= rows) break;
    double* to = partials + (row * cut.chunks + place.chunk) * cut.channels + place.channel;
    for (int channel = 0; channel < kChannels<kPlanes, kWidth>; ++channel) {
      to[channel] = mine.at(row, channel);
    }
  }
}

// Puts the chunks of every channel together: partials[row][chunk][channel] to
// results[row][channel], of which there are two rows.
template <typename State>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    merge_chunks(const double* partials, int64_t chunks, int64_t channels, double* results) {
  const int lanes = static_cast<int>(smaller(channels, kMostLanes));
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * lanes + lane;
  State mine;
  if (group < groups && channel < channels) {
    for (int64_t chunk = group; chunk < chunks; chunk += groups) {
      State other;
      for (int row = 0; row < State::kRows; ++row) {
        other.numbers[row] = partials[(row * chunks + chunk) * channels + channel];
      }
      mine.merge(other);
    }
  }
  merge_groups(mine, lane, lanes, group, groups);
  if (group != 0 || channel >= channels) return;
  results[channel] = mine.at(0, 0);
  results[channels + channel] = mine.at(1, 0);
}

}  // namespace sbp_fast::cuda
