// The dropout kernels. Noise takes longer than memory: neighbours share a block of it wherever
// their layout allows.
#pragma once

#include <cstring>

#include "../dropout_layout.h"
#include "walk.cuh"

namespace sbp_fast::cuda {

// Elements of a block of threads: of 16-bit ones, one turn of the unrolled loop.
inline constexpr int kDropoutChunk = 8192;

// Words without an index that the compiler does not know, which would put them into local memory.
__device__ __forceinline__ uint32_t word_of(const PhiloxBlock& block, uint32_t index) {
  const uint32_t even = index & 2 ? block.words[2] : block.words[0];
  const uint32_t odd = index & 2 ? block.words[3] : block.words[1];
  return index & 1 ? odd : even;
}

// A vector as one integer. A struct nvcc takes apart here, and puts together again only where it
// finds the addresses simple enough.
template <int kWidth, typename T>
__device__ __forceinline__ void store_whole(T* to, const Vector<T, kWidth>& vector) {
  if constexpr (sizeof(vector) == 16) {
    uint64_t halves[2];
    memcpy(halves, &vector, sizeof(halves));
    using Word = unsigned __int128;
    *reinterpret_cast<Word*>(to) = Word{halves[1]} << 64 | halves[0];
  } else if constexpr (sizeof(vector) == 8) {
    uint64_t word;
    memcpy(&word, &vector, sizeof(word));
    *reinterpret_cast<uint64_t*>(to) = word;
  } else {
    store(to, vector);
  }
}

// Where an element of contiguous memory belongs.
struct DropoutPlace {
  int64_t sample;
  int64_t element;  // of the sample
};

__device__ __forceinline__ DropoutPlace place_in_rows(const DropoutRows& rows, int64_t at) {
  const int64_t row = at / rows.inner;
  const int64_t outer = row / rows.samples;
  return {row - outer * rows.samples, outer * rows.inner + (at - row * rows.inner)};
}

// kWidth elements that share an access. More than one only where no group of four crosses the end
// of a row.
template <int kWidth, typename T>
__device__ __forceinline__ void drop_vector(Vector<T, kWidth>& vector, const DropoutRows& rows,
                                            int64_t at, const DropoutMask& mask) {
  constexpr int kGroup = kWidth < kDropoutGroup ? kWidth : kDropoutGroup;
  const auto scale = static_cast<DropoutWide<T>>(mask.scale);
  for (int first = 0; first < kWidth; first += kGroup) {
    const DropoutPlace place = place_in_rows(rows, at + first);
    const PhiloxBlock noise =
        dropout_noise(mask, place.sample, static_cast<uint32_t>(place.element / kDropoutGroup));
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t word =
          kGroup == kDropoutGroup
              ? noise.words[i]
              : word_of(noise, static_cast<uint32_t>(place.element + i) % kDropoutGroup);
      T& value = vector.values[first + i];
      value = dropout_element(value, word, mask.threshold, scale);
    }
  }
}

// Contiguous memory.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dropout_rows(T* output, const T* input, int64_t numel, DropoutRows rows, DropoutMask mask) {
  const int64_t begin = int64_t{blockIdx.x} * kDropoutChunk;
  const int64_t left = numel - begin;
  const int count = static_cast<int>(left < kDropoutChunk ? left : kDropoutChunk);
  T* to = output + begin;
  const T* from = input + begin;
  const auto visit = [&]<int kWide, int kCount>(int first, int step) {
    Vector<T, kWide> vectors[kCount];
    for (int k = 0; k < kCount; ++k) vectors[k] = load<kWide>(from + first + k * step);
    for (int k = 0; k < kCount; ++k) {
      drop_vector(vectors[k], rows, begin + first + k * step, mask);
      store_whole(to + first + k * step, vectors[k]);
    }
  };
  const int rest = walk_vectors<kWidth>(0, count, visit);
  if constexpr (kWidth > 1) walk_vectors<1>(rest, count, visit);
}

// The noise of four elements, the first of which need not begin a block.
__device__ __forceinline__ PhiloxBlock noise_from(const DropoutMask& mask, int64_t sample,
                                                  int64_t element) {
  const auto group = static_cast<uint32_t>(element / kDropoutGroup);
  const auto shift = static_cast<uint32_t>(element % kDropoutGroup);
  const PhiloxBlock noise = dropout_noise(mask, sample, group);
  if (shift == 0) return noise;
  const PhiloxBlock next = dropout_noise(mask, sample, group + 1);
  PhiloxBlock shifted;
  for (uint32_t i = 0; i < kDropoutGroup; ++i) {
    const uint32_t index = shift + i;
    shifted.words[i] =
        index < kDropoutGroup ? word_of(noise, index) : word_of(next, index % kDropoutGroup);
  }
  return shifted;
}

// Four positions with kWidth channels, each of which has noise of its own. More than one channel
// only where four divides the positions: then every channel's begin a block.
template <typename T, int kWidth>
__device__ __forceinline__ void drop_item(T* output, const T* input,
                                          const DropoutChannelsLast& layout, int64_t sample,
                                          int64_t position, int64_t channel,
                                          const DropoutMask& mask) {
  const auto scale = static_cast<DropoutWide<T>>(mask.scale);
  const int64_t at = (sample * layout.positions + position) * layout.channels + channel;
  const int64_t rows = kWidth > 1 ? kDropoutGroup : layout.positions - position;
  T* to = output + at;
  const T* from = input + at;
  Vector<T, kWidth> vectors[kDropoutGroup];
  for (int i = 0; i < kDropoutGroup; ++i) {
    if (i < rows) vectors[i] = load<kWidth>(from + i * layout.channels);
  }
  PhiloxBlock noise[kWidth];
  for (int c = 0; c < kWidth; ++c) {
    const int64_t element = (channel + c) * layout.positions + position;
    if constexpr (kWidth > 1) {
      noise[c] = dropout_noise(mask, sample, static_cast<uint32_t>(element / kDropoutGroup));
    } else {
      noise[c] = noise_from(mask, sample, element);
    }
  }
  for (int i = 0; i < kDropoutGroup; ++i) {
    if (i < rows) {
      Vector<T, kWidth> result;
      for (int c = 0; c < kWidth; ++c) {
        result.values[c] =
            dropout_element(vectors[i].values[c], noise[c].words[i], mask.threshold, scale);
      }
      store_whole(to + i * layout.channels, result);
    }
  }
}

// Channels last, whose number kWidth divides. Threads that are neighbours have
// neighbouring channels.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    dropout_channels_last(T* output, const T* input, int64_t samples, DropoutChannelsLast layout,
                          DropoutMask mask) {
  constexpr int64_t kItems = kDropoutChunk / (kDropoutGroup * kWidth);
  const int64_t vectors = layout.channels / kWidth;
  const int64_t groups = layout.groups();
  const int64_t all = samples * groups * vectors;
  const int64_t begin = int64_t{blockIdx.x} * kItems;
  const int64_t end = begin + kItems < all ? begin + kItems : all;
  for (int64_t item = begin + threadIdx.x; item < end; item += blockDim.x) {
    const int64_t group = item / vectors;
    const int64_t sample = group / groups;
    drop_item<T, kWidth>(output, input, layout, sample, (group - sample * groups) * kDropoutGroup,
                         (item - group * vectors) * kWidth, mask);
  }
}

}  // namespace sbp_fast::cuda
