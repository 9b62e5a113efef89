// How the threads of a block walk over its part of the channels, and what each of them has: its
// place in the block, and the channels that its elements belong to.
#pragma once

#include "channel_cut.h"
#include "walk.cuh"

namespace sbp_fast::cuda {

// Independent loads of one tensor that a thread issues before it uses the first.
template <int kWidth>
inline constexpr int kLoads = kWidth == 1 ? 8 : kUnroll;

// Channels that one vector has elements of.
template <bool kPlanes, int kWidth>
inline constexpr int kChannels = kPlanes ? 1 : kWidth;

// A thread keeps what it knows of each channel of a vector in registers, up to 128 of them. Fewer
// threads then have as many bytes in flight.
template <bool kPlanes, int kWidth>
inline constexpr int kBlocksOfChannels =
    kChannels<kPlanes, kWidth> == 1 ? kBlocksPerMultiprocessor : kBlocksPerMultiprocessor / 2;

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Where a thread stands. Lanes lie side by side in memory where every one has channels of its own;
// in planes all threads share one channel, and every one is a group of its own.
template <bool kPlanes, int kWidth>
struct Place {
  int64_t chunk;
  int64_t line;     // the block's first
  int64_t vector;   // of the channel's in each line, the block's first; of all, the thread's own
  int64_t first;    // where that lies in the first line of all
  int64_t channel;  // the first of this thread's
  int lanes;
  int groups;
  int lane;
  int group;
  bool active;

  __device__ __forceinline__ explicit Place(const ChannelCut& cut) {
    const int64_t block = blockIdx.x;
    if constexpr (kPlanes) {
      channel = block % cut.channels;
      chunk = block / cut.channels;
      line = chunk / cut.across * cut.chunk_lines;
      vector = chunk % cut.across * cut.chunk_vectors;
      first = channel * cut.vectors + vector;
      lanes = 1;
      lane = 0;
      groups = static_cast<int>(blockDim.x);
      group = static_cast<int>(threadIdx.x);
      active = true;
    } else {
      lanes = static_cast<int>(cut.chunk_vectors);
      lane = static_cast<int>(threadIdx.x) % lanes;
      groups = static_cast<int>(blockDim.x) / lanes;
      group = static_cast<int>(threadIdx.x) / lanes;
      chunk = block / cut.across;
      line = chunk * cut.chunk_lines;
      vector = block % cut.across * cut.chunk_vectors + lane;
      first = vector;
      channel = vector * kWidth;
      active = group < groups && vector < cut.vectors;
    }
  }
};

template <int kWidth, typename T>
__device__ __forceinline__ const Vector<T, kWidth>* vectors_of(const T* elements) {
  return reinterpret_cast<const Vector<T, kWidth>*>(elements);
}

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth>* vectors_of(T* elements) {
  return reinterpret_cast<Vector<T, kWidth>*>(elements);
}

// Gives this thread's share of the block's part to
//   visit.operator()<kCount>(at)
// where at[k] says where the k-th of kCount vectors lies, in vectors: from that the compiler sees
// that they may be stored whole. kCount is a compile-time constant, so that what visit loads stays
// in registers. A chunk's vectors are counted in 32 bits.
template <bool kPlanes, int kWidth, typename Visit>
__device__ __forceinline__ void walk_channels(const ChannelCut& cut,
                                              const Place<kPlanes, kWidth>& place,
                                              const Visit& visit) {
  const auto lines = static_cast<unsigned>(smaller(cut.chunk_lines, cut.lines - place.line));
  // Of the part that the threads of a channel share: its vectors side by side, and in all.
  unsigned columns = 1;
  unsigned count = place.active ? lines : 0;
  unsigned index = place.group;
  const unsigned step = place.groups;
  int64_t pitch = cut.vectors;
  if constexpr (kPlanes) {
    columns = static_cast<unsigned>(smaller(cut.chunk_vectors, cut.vectors - place.vector));
    count = lines * columns;
    pitch = cut.channels * cut.vectors;
  }
  unsigned column = index % columns;
  int64_t at = (place.line + index / columns) * pitch + place.first + column;
  // From one vector of this thread to its next, and what comes on top where a line ends on the way.
  const unsigned columns_of_step = step % columns;
  const int64_t vectors_of_step = step / columns * pitch + columns_of_step;
  const int64_t vectors_of_turn = pitch - columns;
  const auto next = [&] {
    const int64_t here = at;
    at += vectors_of_step;
    column += columns_of_step;
    if (column >= columns) {
      column -= columns;
      at += vectors_of_turn;
    }
    index += step;
    return here;
  };
  while (index + (kLoads<kWidth> - 1) * step < count) {
    int64_t batch[kLoads<kWidth>];
    for (int k = 0; k < kLoads<kWidth>; ++k) batch[k] = next();
    visit.template operator()<kLoads<kWidth>>(batch);
  }
  while (index < count) {
    const int64_t one[1] = {next()};
    visit.template operator()<1>(one);
  }
}

}  // namespace sbp_fast::cuda
