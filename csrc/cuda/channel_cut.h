// How batch norm's kernels share out a tensor: which block takes which part of which channels.
// Built on the host from sizes alone, so that tensors of 2^31 elements and more are tested without
// allocating them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sbp_fast::cuda {

// A large tensor is cut into this many blocks or somewhat more, whatever the device: enough to fill
// any several times over, few enough that merging their results costs little.
inline constexpr int64_t kWantedBlocks = 2048;

// Lanes side by side in a block whose channels lie innermost: 512 bytes of each line, in whole
// sectors, and eight lines at a time.
inline constexpr int64_t kMostLanes = 32;

// A dense tensor as lines of vectors. Planes: a channel has `vectors` vectors in each of `lines`
// lines, and lines follow on one another `channels` * `vectors` vectors apart. Otherwise channels
// lie innermost: a line has `vectors` vectors of all channels, and every one of its elements
// belongs to another.
//
// A chunk has chunk_lines by chunk_vectors of them, or what is left at the ends. Chunks of planes
// are counted along a channel's vectors and then its lines; otherwise those side by side are of
// different channels, and only lines are counted.
struct ChannelCut {
  bool planes;
  int64_t lines;
  int64_t channels;
  int64_t vectors;
  int64_t chunk_lines;
  int64_t chunk_vectors;
  int64_t across;  // chunks side by side
  int64_t chunks;  // of each channel

  int64_t blocks() const { return planes ? channels * chunks : across * chunks; }
};

inline int64_t quotient_up(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// `outer` times `channels` runs of `inner` elements, none of them 0, in vectors of `width`
// elements. A block of `threads` threads has at least `loads` vectors for each of them, if there
// are as many.
inline ChannelCut cut_channels(int64_t outer, int64_t channels, int64_t inner, int64_t width,
                               int64_t threads, int64_t loads) {
  ChannelCut cut{};
  cut.planes = inner > 1;
  cut.lines = outer;
  cut.channels = channels;
  cut.vectors = (cut.planes ? inner : channels) / width;
  const int64_t all = outer * cut.vectors * (cut.planes ? channels : 1);
  const int64_t wanted = std::max(all / kWantedBlocks, threads * loads);
  cut.chunk_vectors = cut.planes ? wanted : std::min(kMostLanes, cut.vectors);
  cut.across = quotient_up(cut.vectors, cut.chunk_vectors);
  cut.chunk_vectors = quotient_up(cut.vectors, cut.across);
  cut.chunk_lines = std::clamp<int64_t>(wanted / cut.chunk_vectors, 1, outer);
  cut.chunks = quotient_up(outer, cut.chunk_lines) * (cut.planes ? cut.across : 1);
  return cut;
}

}  // namespace sbp_fast::cuda
