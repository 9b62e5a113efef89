// What one call asks of the device, as the tables that its kernels read: which chunk lies where.
// Built on the host from plain pointers and sizes; needs neither torch's library nor CUDA, so the
// tiling of tensors of 2^31 elements and more is tested without a device and without allocating
// them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "../chunks.h"
#include "../dtypes.h"

namespace sbp_fast::cuda {

// A chunk keeps a block of 256 threads busy for four rounds of four 16-byte accesses, and costs 24
// bytes of table for at least 96 KiB of traffic.
inline constexpr int64_t kChunkElements = 16384;

// More dimensions than this, after merging, have no place in a StridedPair.
inline constexpr int kMaxDims = 8;

// A chunk of a pair whose elements lie in the same order: the pointers are those of its first
// element.
struct FlatChunk {
  void* written;
  const void* read;
  int64_t count;
};

// A pair whose elements lie in different orders. Strides count elements; dimension 0 is the
// outermost.
struct StridedPair {
  void* written;
  const void* read;
  int64_t dims;
  int64_t sizes[kMaxDims];
  int64_t written_strides[kMaxDims];
  int64_t read_strides[kMaxDims];
};

// The tensor that is written and the one that is read; an op that only reads gives the same for
// both.
struct Pair {
  void* written;
  const void* read;
  ScalarType written_dtype;
  ScalarType read_dtype;
  int64_t numel;
  bool flat;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* written_strides;
  const int64_t* read_strides;
};

// A run of chunks that one launch serves: all of one pair of dtypes.
struct Launch {
  ScalarType written_dtype;
  ScalarType read_dtype;
  int64_t first;
  int64_t count;
};

struct Plan {
  std::vector<FlatChunk> flat_chunks;
  std::vector<StridedPair> strided_pairs;
  std::vector<Chunk> strided_chunks;  // Chunk::tensor is a position in strided_pairs
  std::vector<Launch> flat_launches;
  std::vector<Launch> strided_launches;

  int64_t chunks() const {
    return static_cast<int64_t>(flat_chunks.size() + strided_chunks.size());
  }
};

// The dimensions of a pair, outermost in `written` first, with those merged that both tensors walk
// as one. Where more than kMaxDims remain, dims says how many and the arrays hold nothing of use.
inline StridedPair merge_dimensions(const Pair& pair) {
  struct Dimension {
    int64_t written_stride;
    int64_t read_stride;
    int64_t size;
  };
  std::vector<Dimension> dimensions;
  for (int64_t d = 0; d < pair.dim; ++d) {
    if (pair.sizes[d] > 1) {
      dimensions.push_back({pair.written_strides[d], pair.read_strides[d], pair.sizes[d]});
    }
  }
  std::stable_sort(dimensions.begin(), dimensions.end(),
                   [](const Dimension& a, const Dimension& b) {
                     return std::pair(a.written_stride, a.read_stride) >
                            std::pair(b.written_stride, b.read_stride);
                   });
  std::vector<Dimension> merged;
  for (const Dimension& inner : dimensions) {
    if (!merged.empty()) {
      Dimension& outer = merged.back();
      if (outer.written_stride == inner.written_stride * inner.size &&
          outer.read_stride == inner.read_stride * inner.size) {
        outer = {inner.written_stride, inner.read_stride, outer.size * inner.size};
        continue;
      }
    }
    merged.push_back(inner);
  }
  StridedPair result{};
  result.written = pair.written;
  result.read = pair.read;
  result.dims = static_cast<int64_t>(merged.size());
  if (result.dims > kMaxDims) return result;
  for (size_t d = 0; d < merged.size(); ++d) {
    result.sizes[d] = merged[d].size;
    result.written_strides[d] = merged[d].written_stride;
    result.read_strides[d] = merged[d].read_stride;
  }
  return result;
}

// Chunks of equal dtypes come to stand together, in the order of the list otherwise: the order in
// which partial sums are added depends on the arguments alone.
inline Plan make_plan(const std::vector<Pair>& pairs, int64_t chunk_elements = kChunkElements) {
  using Dtypes = std::pair<ScalarType, ScalarType>;
  std::map<Dtypes, std::array<std::vector<const Pair*>, 2>> groups;
  for (const Pair& pair : pairs) {
    if (pair.numel > 0) groups[{pair.written_dtype, pair.read_dtype}][pair.flat].push_back(&pair);
  }
  Plan plan;
  for (const auto& [dtypes, by_flatness] : groups) {
    const auto& [strided, flat] = by_flatness;
    const auto cut = [chunk_elements](const std::vector<const Pair*>& members) {
      return cut_into_chunks(static_cast<int64_t>(members.size()), chunk_elements,
                             [&](int64_t member) { return members[member]->numel; });
    };
    const auto first_flat = static_cast<int64_t>(plan.flat_chunks.size());
    for (const Chunk& chunk : cut(flat)) {
      const Pair& pair = *flat[chunk.tensor];
      plan.flat_chunks.push_back(
          {static_cast<char*>(pair.written) + chunk.begin * bytes_per_element(pair.written_dtype),
           static_cast<const char*>(pair.read) + chunk.begin * bytes_per_element(pair.read_dtype),
           chunk.count});
    }
    const auto first_pair = static_cast<int64_t>(plan.strided_pairs.size());
    const auto first_strided = static_cast<int64_t>(plan.strided_chunks.size());
    for (const Pair* pair : strided) plan.strided_pairs.push_back(merge_dimensions(*pair));
    for (const Chunk& chunk : cut(strided)) {
      plan.strided_chunks.push_back({first_pair + chunk.tensor, chunk.begin, chunk.count});
    }
    const auto add_launch = [&](std::vector<Launch>& launches, int64_t first, size_t end) {
      const int64_t count = static_cast<int64_t>(end) - first;
      if (count > 0) launches.push_back({dtypes.first, dtypes.second, first, count});
    };
    add_launch(plan.flat_launches, first_flat, plan.flat_chunks.size());
    add_launch(plan.strided_launches, first_strided, plan.strided_chunks.size());
  }
  return plan;
}

}  // namespace sbp_fast::cuda
