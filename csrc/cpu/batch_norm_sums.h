// The two statistics of batch norm over one block: sums of terms that are computed and added in
// float64, whatever the dtype. Included once per instruction set.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../batch_norm_arithmetic.h"
#include "batch_norm_kernels.h"
#include "expand.h"
#include "vector.h"

namespace sbp_fast::cpu {
namespace {

// As many doubles as a full vector has floats.
inline constexpr int kPairLanes = 2 * kDoubleLanes;

inline Doubles load_floats_as_doubles(const float* address) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm256_loadu_ps(address)));
#elif defined(__AVX2__)
  return reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm_loadu_ps(address)));
#else
  return Doubles{address[0], address[1]};
#endif
}

struct DoublePair {
  Doubles low = {};
  Doubles high = {};
};

inline DoublePair operator-(DoublePair a, DoublePair b) { return {a.low - b.low, a.high - b.high}; }
inline DoublePair operator*(DoublePair a, DoublePair b) { return {a.low * b.low, a.high * b.high}; }
inline DoublePair& operator+=(DoublePair& a, DoublePair b) {
  a.low += b.low;
  a.high += b.high;
  return a;
}

inline double total(DoublePair pair) {
  const Doubles both = pair.low + pair.high;
  double sum = 0.0;
  for (int lane = 0; lane < kDoubleLanes; ++lane) sum += both[lane];
  return sum;
}

// How terms are computed: many at a time, or singly where there are fewer than that.
struct ManyTerms {
  using Value = DoublePair;
  template <typename storage_t>
  static DoublePair load(const storage_t* address) {
    if constexpr (std::is_same_v<storage_t, double>) {
      return {cpu::load<Doubles>(address), cpu::load<Doubles>(address + kDoubleLanes)};
    } else if constexpr (std::is_same_v<storage_t, float>) {
      return {load_floats_as_doubles(address), load_floats_as_doubles(address + kDoubleLanes)};
    } else {
      const Floats wide = load_as<float, kPairLanes>(address);
      return {low_half(wide), high_half(wide)};
    }
  }
  static void store(double* address, DoublePair value) {
    cpu::store(address, value.low);
    cpu::store(address + kDoubleLanes, value.high);
  }
  static DoublePair broadcast(double value) { return {value - Doubles{}, value - Doubles{}}; }
};

struct OneTerm {
  using Value = double;
  template <typename storage_t>
  static double load(const storage_t* address) {
    return static_cast<double>(*address);
  }
};

template <typename Value>
struct Terms {
  Value first;
  Value second;
};

// sum(first) and sum(first * second).
template <typename Value>
struct Sums {
  Value first = {};
  Value product = {};

  inline void add(const Terms<Value>& terms) {
    first += terms.first;
    product += terms.first * terms.second;
  }
};

// Keeps the last `count` lanes and makes zeros of the others, whatever they hold.
inline Terms<DoublePair> last_lanes(const Terms<DoublePair>& terms, int64_t count) {
  static constexpr auto kMasks = [] {
    struct {
      int64_t words[2 * kPairLanes];
    } masks{};
    for (int i = kPairLanes; i < 2 * kPairLanes; ++i) masks.words[i] = -1;
    return masks;
  }();
  using Words = Vector<int64_t, kDoubleLanes>;
  const auto low = load<Words>(kMasks.words + count);
  const auto high = load<Words>(kMasks.words + count + kDoubleLanes);
  const auto keep = [](Doubles value, Words kept) {
    return reinterpret_cast<Doubles>(reinterpret_cast<Words>(value) & kept);
  };
  return {{keep(terms.first.low, low), keep(terms.first.high, high)},
          {keep(terms.second.low, low), keep(terms.second.high, high)}};
}

// Where the terms come from: x - s for the one, and for the other the same again or dy. `s` is a
// pivot or a mean.
template <typename storage_t>
struct Distances {
  const storage_t* input;

  template <typename Lanes>
  Terms<typename Lanes::Value> terms(Lanes, int64_t offset, typename Lanes::Value s) const {
    const auto distance = Lanes::load(input + offset) - s;
    return {distance, distance};
  }
  void prefetch(int64_t offset) const { __builtin_prefetch(input + offset); }
};

template <typename storage_t>
struct GradientsAndDistances {
  const storage_t* grad_output;
  const storage_t* input;

  template <typename Lanes>
  Terms<typename Lanes::Value> terms(Lanes, int64_t offset, typename Lanes::Value s) const {
    return {Lanes::load(grad_output + offset), Lanes::load(input + offset) - s};
  }
  void prefetch(int64_t offset) const {
    __builtin_prefetch(grad_output + offset);
    __builtin_prefetch(input + offset);
  }
};

// Sums over the runs of one channel, each of kPairLanes elements or more.
template <typename Source>
inline Sums<double> sum_runs(const ChannelBlock& block, int64_t begin, const Source source,
                             double subtrahend) {
  constexpr int64_t kAhead = 256;  // elements
  const DoublePair s = ManyTerms::broadcast(subtrahend);
  Sums<DoublePair> even, odd;  // two of each, so that one addition need not wait for the one before
  for (int64_t run = 0; run < block.outer; ++run, begin += block.outer_stride) {
    const int64_t end = begin + block.inner;
    int64_t i = begin;
    for (; i + 2 * kPairLanes <= end; i += 2 * kPairLanes) {
      source.prefetch(i + kAhead);
      even.add(source.terms(ManyTerms(), i, s));
      odd.add(source.terms(ManyTerms(), i + kPairLanes, s));
    }
    if (i + kPairLanes <= end) {
      even.add(source.terms(ManyTerms(), i, s));
      i += kPairLanes;
    }
    if (i < end) odd.add(last_lanes(source.terms(ManyTerms(), end - kPairLanes, s), end - i));
  }
  even.first += odd.first;
  even.product += odd.product;
  return {total(even.first), total(even.product)};
}

// Rows that are added up in registers before their sums go to memory: more would be more streams of
// memory than a processor follows.
inline constexpr int64_t kTileRows = 8;

// Sums down each of `columns` columns, into one double each; so many are the subtrahends, too.
template <typename Source>
inline void sum_columns(const ChannelBlock& block, int64_t begin, int64_t columns,
                        const Source source, const double* subtrahends, double* first,
                        double* product) {
  std::fill_n(first, columns, 0.0);
  std::fill_n(product, columns, 0.0);
  const int64_t stride = block.outer_stride;
  const auto load_sums = [=](int64_t column) {
    return Sums<DoublePair>{ManyTerms::load(first + column), ManyTerms::load(product + column)};
  };
  const auto store_sums = [=](int64_t column, const Sums<DoublePair>& sums) {
    ManyTerms::store(first + column, sums.first);
    ManyTerms::store(product + column, sums.product);
  };
  for (int64_t row = 0; row < block.outer; row += kTileRows, begin += kTileRows * stride) {
    const int64_t rows = std::min(kTileRows, block.outer - row);
    int64_t column = 0;
    for (; column + 2 * kPairLanes <= columns; column += 2 * kPairLanes) {
      const DoublePair left_s = ManyTerms::load(subtrahends + column);
      const DoublePair right_s = ManyTerms::load(subtrahends + column + kPairLanes);
      Sums<DoublePair> left = load_sums(column);
      Sums<DoublePair> right = load_sums(column + kPairLanes);
      for (int64_t k = 0; k < rows; ++k) {
        const int64_t offset = begin + k * stride + column;
        source.prefetch(offset + kTileRows * stride);
        left.add(source.terms(ManyTerms(), offset, left_s));
        right.add(source.terms(ManyTerms(), offset + kPairLanes, right_s));
      }
      store_sums(column, left);
      store_sums(column + kPairLanes, right);
    }
    if (column + kPairLanes <= columns) {
      const DoublePair s = ManyTerms::load(subtrahends + column);
      Sums<DoublePair> sums = load_sums(column);
      for (int64_t k = 0; k < rows; ++k) {
        sums.add(source.terms(ManyTerms(), begin + k * stride + column, s));
      }
      store_sums(column, sums);
      column += kPairLanes;
    }
    if (column == columns) continue;
    if (columns >= kPairLanes) {
      const int64_t last = columns - kPairLanes;
      const DoublePair s = ManyTerms::load(subtrahends + last);
      Sums<DoublePair> sums = load_sums(last);
      for (int64_t k = 0; k < rows; ++k) {
        sums.add(
            last_lanes(source.terms(ManyTerms(), begin + k * stride + last, s), columns - column));
      }
      store_sums(last, sums);
      continue;
    }
    for (; column < columns; ++column) {
      Sums<double> sums{first[column], product[column]};
      for (int64_t k = 0; k < rows; ++k) {
        sums.add(source.terms(OneTerm(), begin + k * stride + column, subtrahends[column]));
      }
      first[column] = sums.first;
      product[column] = sums.product;
    }
  }
}

// Adds up every `inner` neighbours, in place: one sum per channel is left.
inline void join_columns(double* values, int64_t channels, int64_t inner) {
  for (; inner % 2 == 0; inner /= 2) {
    const int64_t halves = channels * inner / 2;
    for (int64_t i = 0; i < halves; ++i) values[i] = values[2 * i] + values[2 * i + 1];
  }
  if (inner == 1) return;
  for (int64_t channel = 0; channel < channels; ++channel) {
    double sum = 0.0;
    for (int64_t i = 0; i < inner; ++i) sum += values[channel * inner + i];
    values[channel] = sum;
  }
}

// Runs shorter than this are columns of the matrix whose rows are the outer dimension.
inline bool is_walked_in_columns(const ChannelBlock& block) {
  return block.inner < 2 * kPairLanes && block.inner == block.channel_stride;
}

// A pivot is the mean of this part of a channel's values.
inline constexpr int64_t kPivotPart = 32;

template <typename storage_t>
double pivot_of_run(const storage_t* run, const ChannelBlock& block) {
  const int64_t most = std::min(block.inner, block.outer * block.inner / kPivotPart);
  DoublePair sum = ManyTerms::load(run);
  int64_t count = kPairLanes;
  for (; count + kPairLanes <= most; count += kPairLanes) sum += ManyTerms::load(run + count);
  return usable_pivot(total(sum) / static_cast<double>(count));
}

template <typename storage_t>
void moments_of_runs(const storage_t* input, const ChannelBlock& block, const MomentRows& result) {
  const auto count = static_cast<double>(block.outer * block.inner);
  for (int64_t channel = 0; channel < block.channels; ++channel) {
    const int64_t begin = channel * block.channel_stride;
    const double pivot = pivot_of_run(input + begin, block);
    const Sums<double> sums = sum_runs(block, begin, Distances<storage_t>{input}, pivot);
    const Moments moments = moments_about_pivot(sums.first, sums.product, count);
    result.pivot[channel] = pivot;
    result.distance[channel] = moments.distance;
    result.m2[channel] = moments.m2;
  }
}

// Of the first column of each channel.
template <typename storage_t>
void pivots_of_columns(const storage_t* input, const ChannelBlock& block, int64_t channels,
                       double* pivot) {
  const int64_t rows = std::max<int64_t>(1, block.outer / kPivotPart);
  std::fill_n(pivot, channels, 0.0);
  for (int64_t row = 0; row < rows; ++row, input += block.outer_stride) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      pivot[channel] += static_cast<double>(input[channel * block.inner]);
    }
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    pivot[channel] = usable_pivot(pivot[channel] / static_cast<double>(rows));
  }
}

template <typename storage_t>
void moments_of_columns(const storage_t* input, const ChannelBlock& block,
                        const MomentRows& result) {
  const auto count = static_cast<double>(block.outer * block.inner);
  for (const Group group : Groups(block.channels, block.inner)) {
    const int64_t begin = group.first * block.inner;
    double* pivot = result.pivot + group.first;
    double pivots[kExpandedColumns<double>], sum[kGroupColumns], sum_squares[kGroupColumns];
    pivots_of_columns(input + begin, block, group.channels, pivot);
    expand(pivot, group.channels, block.inner, pivots);
    sum_columns(block, begin, group.channels * block.inner, Distances<storage_t>{input}, pivots,
                sum, sum_squares);
    join_columns(sum, group.channels, block.inner);
    join_columns(sum_squares, group.channels, block.inner);
    for (int64_t channel = 0; channel < group.channels; ++channel) {
      const Moments moments = moments_about_pivot(sum[channel], sum_squares[channel], count);
      result.distance[group.first + channel] = moments.distance;
      result.m2[group.first + channel] = moments.m2;
    }
  }
}

template <typename storage_t>
void moments_of_block(const void* input_data, const ChannelBlock& block, const MomentRows& result) {
  const auto* input = static_cast<const storage_t*>(input_data);
  if (is_walked_in_columns(block)) {
    moments_of_columns(input, block, result);
  } else {
    moments_of_runs(input, block, result);
  }
}

template <typename storage_t>
void backward_sums_of_runs(const GradientsAndDistances<storage_t>& source,
                           const ChannelBlock& block, const double* mean, const double* inv_std,
                           double* sum, double* product_sum) {
  for (int64_t channel = 0; channel < block.channels; ++channel) {
    const Sums<double> sums =
        sum_runs(block, channel * block.channel_stride, source, mean[channel]);
    sum[channel] = sums.first;
    product_sum[channel] = sums.product * inv_std[channel];
  }
}

template <typename storage_t>
void backward_sums_of_columns(const GradientsAndDistances<storage_t>& source,
                              const ChannelBlock& block, const double* mean, const double* inv_std,
                              double* sum, double* product_sum) {
  for (const Group group : Groups(block.channels, block.inner)) {
    double means[kExpandedColumns<double>], sums[kGroupColumns], products[kGroupColumns];
    expand(mean + group.first, group.channels, block.inner, means);
    sum_columns(block, group.first * block.inner, group.channels * block.inner, source, means, sums,
                products);
    join_columns(sums, group.channels, block.inner);
    join_columns(products, group.channels, block.inner);
    for (int64_t channel = 0; channel < group.channels; ++channel) {
      sum[group.first + channel] = sums[channel];
      product_sum[group.first + channel] = products[channel] * inv_std[group.first + channel];
    }
  }
}

template <typename storage_t>
void backward_sums_of_block(const void* grad_output_data, const void* input_data,
                            const ChannelBlock& block, const double* mean, const double* inv_std,
                            double* sum, double* product_sum) {
  const GradientsAndDistances<storage_t> source{static_cast<const storage_t*>(grad_output_data),
                                                static_cast<const storage_t*>(input_data)};
  if (is_walked_in_columns(block)) {
    backward_sums_of_columns(source, block, mean, inv_std, sum, product_sum);
  } else {
    backward_sums_of_runs(source, block, mean, inv_std, sum, product_sum);
  }
}

}  // namespace
}  // namespace sbp_fast::cpu
