// Statistics: sums of squares in double and the non-finite flag. Every block leaves the share of
// its chunk in memory and a second kernel adds the shares in a fixed order: the same call gives the
// same bits every time, which atomic additions would not.
#pragma once

#include <type_traits>

#include "walk.cuh"

namespace sbp_fast::cuda {

struct Partial {
  double squares_in = 0.0;
  double squares_result = 0.0;
  bool non_finite = false;

  template <typename incoming_t, typename result_t>
  __device__ __forceinline__ void add(incoming_t incoming, result_t result) {
    const auto wide_in = static_cast<double>(incoming);
    const auto wide_result = static_cast<double>(result);
    squares_in += wide_in * wide_in;
    squares_result += wide_result * wide_result;
    non_finite |= is_non_finite(result);
  }
};

inline constexpr int kWarp = 32;
inline constexpr int kMaxWarps = 1024 / kWarp;

__device__ __forceinline__ double warp_sum(double value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// The sum over the threads of the block; only thread 0 gets it. All threads must call it, once per
// launch: the shared memory is not guarded against a second round.
__device__ __forceinline__ Partial block_sum(const Partial& mine) {
  __shared__ double squares_in[kMaxWarps];
  __shared__ double squares_result[kMaxWarps];
  const double warp_in = warp_sum(mine.squares_in);
  const double warp_result = warp_sum(mine.squares_result);
  if (threadIdx.x % kWarp == 0) {
    squares_in[threadIdx.x / kWarp] = warp_in;
    squares_result[threadIdx.x / kWarp] = warp_result;
  }
  Partial total;
  total.non_finite = __syncthreads_or(mine.non_finite) != 0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
      total.squares_in += squares_in[warp];
      total.squares_result += squares_result[warp];
    }
  }
  return total;
}

__device__ __forceinline__ void write_partial(const Partial& mine, Partial* partials) {
  const Partial total = block_sum(mine);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// One block adds the partials of a whole call to the caller's three numbers.
[[maybe_unused]] static __global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    add_partials(const Partial* partials, int64_t count, double* statistics) {
  Partial mine;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    mine.squares_in += partials[i].squares_in;
    mine.squares_result += partials[i].squares_result;
    mine.non_finite |= partials[i].non_finite;
  }
  const Partial total = block_sum(mine);
  if (threadIdx.x == 0) {
    statistics[0] += total.squares_in;
    statistics[1] += total.squares_result;
    if (total.non_finite) statistics[2] = 1.0;
  }
}

// Narrow gradients are widened to float32, which holds them exactly.
template <typename gradient_t>
using Wide = std::conditional_t<std::is_same_v<gradient_t, double>, double, float>;

template <typename gradient_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    statistics_flat(const FlatChunk* chunks, Partial* partials) {
  const FlatChunk chunk = chunks[blockIdx.x];
  const auto* gradient = global_pointer<const gradient_t>(chunk.read);
  Partial partial;
  walk_chunk<kVectorWidth<gradient_t, gradient_t>>(
      chunk, [&]<int kWidth, int kCount>(int first, int step) {
        Vector<gradient_t, kWidth> incoming[kCount];
        for (int k = 0; k < kCount; ++k) incoming[k] = load<kWidth>(gradient + first + k * step);
        for (int k = 0; k < kCount; ++k) {
          for (int i = 0; i < kWidth; ++i) {
            const auto value = static_cast<Wide<gradient_t>>(incoming[k].values[i]);
            partial.add(value, value);
          }
        }
      });
  write_partial(partial, partials);
}

template <typename gradient_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    statistics_strided(const StridedPair* pairs, const Chunk* chunks, Partial* partials) {
  const Chunk chunk = chunks[blockIdx.x];
  const StridedPair& pair = pairs[chunk.tensor];
  const auto* gradient = global_pointer<const gradient_t>(pair.read);
  Partial partial;
  walk_strided(pair, chunk, [&](const Location& location) {
    const auto value = static_cast<Wide<gradient_t>>(gradient[location.read]);
    partial.add(value, value);
  });
  write_partial(partial, partials);
}

}  // namespace sbp_fast::cuda
