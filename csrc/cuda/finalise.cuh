// The finalise kernels: scale, clip and cast, one block per chunk.
#pragma once

#include "walk.cuh"

namespace sbp_fast::cuda {

// What every element is multiplied by. Scale and norm lie on the device, so that the host never
// waits for them; norm may be null.
struct Coefficient {
  const double* scale;
  const double* norm;
  double max_norm;

  // One thread computes it for the block: a division in double is dear. All threads must call it.
  __device__ __forceinline__ double read() const {
    __shared__ double shared;
    if (threadIdx.x == 0) {
      shared = norm == nullptr ? *scale : *scale * clip_coefficient(*norm, max_norm);
    }
    __syncthreads();
    return shared;
  }
};

// Outputs may be the accumulators themselves: a thread reads an element before it writes it, and no
// other thread touches it.
template <typename output_t, typename accumulator_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    finalise_flat(const FlatChunk* chunks, Coefficient coefficient) {
  const FlatChunk chunk = chunks[blockIdx.x];
  auto* output = global_pointer<output_t>(chunk.written);
  const auto* accumulator = global_pointer<const accumulator_t>(chunk.read);
  const auto factor = static_cast<accumulator_t>(coefficient.read());
  walk_chunk<kVectorWidth<output_t, accumulator_t>>(
      chunk, [&]<int kWidth, int kCount>(int first, int step) {
        Vector<accumulator_t, kWidth> sums[kCount];
        for (int k = 0; k < kCount; ++k) sums[k] = load<kWidth>(accumulator + first + k * step);
        for (int k = 0; k < kCount; ++k) {
          Vector<output_t, kWidth> result;
          for (int i = 0; i < kWidth; ++i) {
            result.values[i] = static_cast<output_t>(sums[k].values[i] * factor);
          }
          store(output + first + k * step, result);
        }
      });
}

template <typename output_t, typename accumulator_t>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    finalise_strided(const StridedPair* pairs, const Chunk* chunks, Coefficient coefficient) {
  const Chunk chunk = chunks[blockIdx.x];
  const StridedPair& pair = pairs[chunk.tensor];
  auto* output = global_pointer<output_t>(pair.written);
  const auto* accumulator = global_pointer<const accumulator_t>(pair.read);
  const auto factor = static_cast<accumulator_t>(coefficient.read());
  walk_strided(pair, chunk, [&](const Location& location) {
    output[location.written] = static_cast<output_t>(accumulator[location.read] * factor);
  });
}

}  // namespace sbp_fast::cuda
