// Cuts a list of tensors into chunks of a fixed number of elements. The cut depends on the sizes
// alone, never on the number of threads or multiprocessors, so partial sums taken chunk by chunk
// are the same on every machine of one kind. All arithmetic is 64 bit: a tensor may hold 2^31 or
// more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sbp_fast {

struct Chunk {
  int64_t tensor;  // position in the list
  int64_t begin;   // first element within the tensor
  int64_t count;   // elements; only a tensor's last chunk has fewer than chunk_elements
};

template <typename NumelOf>
std::vector<Chunk> cut_into_chunks(int64_t tensors, int64_t chunk_elements, NumelOf numel_of) {
  int64_t total = 0;
  for (int64_t tensor = 0; tensor < tensors; ++tensor) {
    total += (numel_of(tensor) + chunk_elements - 1) / chunk_elements;
  }
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<size_t>(total));
  for (int64_t tensor = 0; tensor < tensors; ++tensor) {
    const int64_t numel = numel_of(tensor);
    for (int64_t begin = 0; begin < numel; begin += chunk_elements) {
      chunks.push_back({tensor, begin, std::min(chunk_elements, numel - begin)});
    }
  }
  return chunks;
}

}  // namespace sbp_fast
