// The accumulation kernels: G += scale * G_i, one block per chunk.
#pragma once

#include "statistics.cuh"

namespace sbp_fast::cuda {

template <typename accumulator_t, typename gradient_t, bool kFirstWrite, bool kStatistics>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    accumulate_flat(const FlatChunk* chunks, double scale, Partial* partials) {
  const FlatChunk chunk = chunks[blockIdx.x];
  auto* accumulator = global_pointer<accumulator_t>(chunk.written);
  const auto* gradient = global_pointer<const gradient_t>(chunk.read);
  const auto factor = static_cast<accumulator_t>(scale);
  Partial partial;
  walk_chunk<kVectorWidth<accumulator_t, gradient_t>>(
      chunk, [&]<int kWidth, int kCount>(int first, int step) {
        Vector<gradient_t, kWidth> incoming[kCount];
        Vector<accumulator_t, kWidth> result[kCount];
        for (int k = 0; k < kCount; ++k) {
          incoming[k] = load<kWidth>(gradient + first + k * step);
          if constexpr (!kFirstWrite) result[k] = load<kWidth>(accumulator + first + k * step);
        }
        for (int k = 0; k < kCount; ++k) {
          for (int i = 0; i < kWidth; ++i) {
            const gradient_t value = incoming[k].values[i];
            accumulator_t& sum = result[k].values[i];
            sum = accumulate<kFirstWrite>(kFirstWrite ? accumulator_t(0) : sum,
                                          static_cast<accumulator_t>(value), factor);
            if constexpr (kStatistics) partial.add(value, sum);
          }
          store(accumulator + first + k * step, result[k]);
        }
      });
  if constexpr (kStatistics) write_partial(partial, partials);
}

// Without statistics `partials` is null.
template <typename accumulator_t, typename gradient_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    accumulate_strided(const StridedPair* pairs, const Chunk* chunks, double scale,
                       bool first_write, Partial* partials) {
  const Chunk chunk = chunks[blockIdx.x];
  const StridedPair& pair = pairs[chunk.tensor];
  auto* accumulator = global_pointer<accumulator_t>(pair.written);
  const auto* gradient = global_pointer<const gradient_t>(pair.read);
  const auto factor = static_cast<accumulator_t>(scale);
  Partial partial;
  walk_strided(pair, chunk, [&](const Location& location) {
    const gradient_t value = gradient[location.read];
    const auto incoming = static_cast<accumulator_t>(value);
    accumulator_t& sum = accumulator[location.written];
    sum = first_write ? accumulate<true>(accumulator_t(0), incoming, factor)
                      : accumulate<false>(sum, incoming, factor);
    partial.add(value, sum);
  });
  if (partials != nullptr) write_partial(partial, partials);
}

}  // namespace sbp_fast::cuda
