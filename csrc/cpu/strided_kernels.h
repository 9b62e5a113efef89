// Pairs of tensors whose elements lie in different orders: a plain walk over the indices. Correct
// for every layout; speed is for the flat kernels, to which nearly all gradients go.
#pragma once

#include <vector>

#include "../arithmetic.h"
#include "../tensor_list.h"
#include "kernels.h"

namespace sbp_fast::cpu {

// Visits elements [begin, begin + count) in the row-major order of the indices and calls
// visit(offset in a, offset in b), offsets in elements.
template <typename Visit>
void walk(const TensorView& a, const TensorView& b, int64_t begin, int64_t count, Visit visit) {
  const auto dim = static_cast<size_t>(a.dim);
  std::vector<int64_t> index(dim);
  int64_t offset_a = 0;
  int64_t offset_b = 0;
  int64_t rest = begin;
  for (size_t d = dim; d-- > 0;) {
    index[d] = rest % a.sizes[d];
    rest /= a.sizes[d];
    offset_a += index[d] * a.strides[d];
    offset_b += index[d] * b.strides[d];
  }
  for (int64_t visited = 0; visited < count; ++visited) {
    visit(offset_a, offset_b);
    for (size_t d = dim; d-- > 0;) {
      offset_a += a.strides[d];
      offset_b += b.strides[d];
      if (++index[d] < a.sizes[d]) break;
      offset_a -= a.sizes[d] * a.strides[d];
      offset_b -= a.sizes[d] * b.strides[d];
      index[d] = 0;
    }
  }
}

template <bool kFirstWrite, typename accumulator_t, typename gradient_t>
ChunkStatistics accumulate_strided(const TensorView& accumulator_view,
                                   const TensorView& gradient_view, int64_t begin, int64_t count,
                                   double scale) {
  auto* accumulator = accumulator_view.mutable_data<accumulator_t>();
  const auto* gradient = gradient_view.const_data<gradient_t>();
  ChunkStatistics statistics;
  walk(accumulator_view, gradient_view, begin, count, [&](int64_t to, int64_t from) {
    const auto exact = static_cast<double>(gradient[from]);
    const accumulator_t result = accumulate<kFirstWrite>(
        kFirstWrite ? accumulator_t(0) : accumulator[to],
        static_cast<accumulator_t>(gradient[from]), static_cast<accumulator_t>(scale));
    accumulator[to] = result;
    statistics.sum_squares_in += exact * exact;
    statistics.sum_squares_result += double(result) * double(result);
    statistics.non_finite |= is_non_finite(result);
  });
  return statistics;
}

template <typename gradient_t>
ChunkStatistics statistics_strided(const TensorView& gradient_view, int64_t begin, int64_t count) {
  const auto* gradient = gradient_view.const_data<gradient_t>();
  ChunkStatistics statistics;
  walk(gradient_view, gradient_view, begin, count, [&](int64_t from, int64_t) {
    const auto value = static_cast<double>(gradient[from]);
    statistics.sum_squares_in += value * value;
    statistics.non_finite |= is_non_finite(value);
  });
  statistics.sum_squares_result = statistics.sum_squares_in;
  return statistics;
}

template <typename output_t, typename accumulator_t>
void finalise_strided(const TensorView& output_view, const TensorView& accumulator_view,
                      int64_t begin, int64_t count, double coefficient) {
  auto* output = output_view.mutable_data<output_t>();
  const auto* accumulator = accumulator_view.const_data<accumulator_t>();
  walk(output_view, accumulator_view, begin, count, [&](int64_t to, int64_t from) {
    output[to] = static_cast<output_t>(accumulator[from] * static_cast<accumulator_t>(coefficient));
  });
}

}  // namespace sbp_fast::cpu
