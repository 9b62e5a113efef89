// The three kernels on one contiguous chunk. Included once per instruction set.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "vector.h"

namespace sbp_fast::cpu {
namespace {

template <typename accumulator_t>
inline constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(accumulator_t));

template <bool kFirstWrite, bool kStatistics, typename accumulator_t, typename gradient_t>
inline void accumulate_elements(accumulator_t* accumulator, const gradient_t* gradient,
                                int64_t count, accumulator_t scale, ChunkStatistics& statistics) {
  for (int64_t i = 0; i < count; ++i) {
    const auto incoming = static_cast<accumulator_t>(gradient[i]);
    const accumulator_t previous = kFirstWrite ? accumulator_t(0) : accumulator[i];
    const accumulator_t result = accumulate<kFirstWrite>(previous, incoming, scale);
    accumulator[i] = result;
    if constexpr (kStatistics) {
      const auto exact = static_cast<double>(gradient[i]);
      statistics.sum_squares_in += exact * exact;
      statistics.sum_squares_result += double(result) * double(result);
      statistics.non_finite |= is_non_finite(result);
    }
  }
}

template <bool kFirstWrite, bool kStatistics, bool kStreaming, typename accumulator_t,
          typename gradient_t>
ChunkStatistics accumulate_chunk(void* accumulator_data, const void* gradient_data, int64_t count,
                                 double scale_value) {
  constexpr int kLanes = kLanesOf<accumulator_t>;
  using V = Vector<accumulator_t, kLanes>;
  auto* accumulator = static_cast<accumulator_t*>(accumulator_data);
  const auto* gradient = static_cast<const gradient_t*>(gradient_data);
  const auto scale = static_cast<accumulator_t>(scale_value);

  ChunkStatistics statistics;
  if constexpr (kStreaming) {
    // Streaming stores need whole, aligned vectors: the elements before the first one go singly.
    const auto misaligned = reinterpret_cast<uintptr_t>(accumulator) % kVectorBytes;
    const int64_t head = std::min<int64_t>(
        count, misaligned ? (kVectorBytes - misaligned) / sizeof(accumulator_t) : 0);
    accumulate_elements<kFirstWrite, kStatistics>(accumulator, gradient, head, scale, statistics);
    accumulator += head;
    gradient += head;
    count -= head;
  }

  // Two of each, so that one addition need not wait for the one before.
  SumOfSquares in_even, in_odd, result_even, result_odd;
  NonFinite<accumulator_t, kLanes> non_finite;
  const auto step = [&](int64_t i, SumOfSquares& squares_in, SumOfSquares& squares_result) {
    const V incoming = load_as<accumulator_t, kLanes>(gradient + i);
    V result = scale * incoming;
    if constexpr (!kFirstWrite) result += load<V>(accumulator + i);
    if constexpr (kStreaming) {
      store_streaming(accumulator + i, result);
    } else {
      store(accumulator + i, result);
    }
    if constexpr (kStatistics) {
      if constexpr (std::is_same_v<gradient_t, double> && std::is_same_v<accumulator_t, float>) {
        squares_in.add_exact(gradient + i);
      } else {
        squares_in.add(incoming);
      }
      squares_result.add(result);
      non_finite.add(result);
    }
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    prefetch_ahead<false, 2 * kLanes * sizeof(gradient_t)>(gradient + i);
    if constexpr (!kFirstWrite) {
      prefetch_ahead<true, 2 * kLanes * sizeof(accumulator_t)>(accumulator + i);
    }
    step(i, in_even, result_even);
    step(i + kLanes, in_odd, result_odd);
  }
  for (; i + kLanes <= count; i += kLanes) step(i, in_even, result_even);
  if constexpr (kStreaming) finish_streaming();
  if constexpr (kStatistics) {
    statistics.sum_squares_in += in_even.total() + in_odd.total();
    statistics.sum_squares_result += result_even.total() + result_odd.total();
    statistics.non_finite |= non_finite.any();
  }
  accumulate_elements<kFirstWrite, kStatistics>(accumulator + i, gradient + i, count - i, scale,
                                                statistics);
  return statistics;
}

// Narrow gradients are widened to float32, which holds them exactly.
template <typename gradient_t>
ChunkStatistics statistics_chunk(const void* gradient_data, int64_t count) {
  using wide_t = std::conditional_t<std::is_same_v<gradient_t, double>, double, float>;
  constexpr int kLanes = kLanesOf<wide_t>;
  const auto* gradient = static_cast<const gradient_t*>(gradient_data);
  ChunkStatistics statistics;
  SumOfSquares even, odd;
  NonFinite<wide_t, kLanes> non_finite;
  const auto step = [&](int64_t i, SumOfSquares& squares) {
    const auto value = load_as<wide_t, kLanes>(gradient + i);
    squares.add(value);
    non_finite.add(value);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    prefetch_ahead<false, 2 * kLanes * sizeof(gradient_t)>(gradient + i);
    step(i, even);
    step(i + kLanes, odd);
  }
  for (; i + kLanes <= count; i += kLanes) step(i, even);
  double sum = even.total() + odd.total();
  statistics.non_finite = non_finite.any();
  for (; i < count; ++i) {
    const auto value = static_cast<wide_t>(gradient[i]);
    sum += double(value) * double(value);
    statistics.non_finite |= is_non_finite(value);
  }
  statistics.sum_squares_in = statistics.sum_squares_result = sum;
  return statistics;
}

template <typename output_t, typename accumulator_t>
void finalise_chunk(void* output_data, const void* accumulator_data, int64_t count,
                    double coefficient_value) {
  constexpr int kLanes = kLanesOf<accumulator_t>;
  using V = Vector<accumulator_t, kLanes>;
  auto* output = static_cast<output_t*>(output_data);
  const auto* accumulator = static_cast<const accumulator_t*>(accumulator_data);
  const auto coefficient = static_cast<accumulator_t>(coefficient_value);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_as<kLanes, accumulator_t>(output + i, load<V>(accumulator + i) * coefficient);
  }
  for (; i < count; ++i) output[i] = static_cast<output_t>(accumulator[i] * coefficient);
}

}  // namespace
}  // namespace sbp_fast::cpu
