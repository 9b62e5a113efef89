// Values per channel become values per column, where a channel has several columns side by side.
// Included once per instruction set.
#pragma once

#include <algorithm>

#include "batch_norm_kernels.h"
#include "vector.h"

namespace sbp_fast::cpu {
namespace {

// Columns are taken in groups of whole channels: what belongs to a group stays in the first cache.
inline constexpr int64_t kGroupColumns = 512;

// Room for a group, and for the vector that `expand` writes past its end.
template <typename T>
inline constexpr int64_t kExpandedColumns = kGroupColumns + kVectorBytes / sizeof(T);

struct Group {
  int64_t first;  // channel
  int64_t channels;
};

// The groups of `channels` that have `inner` columns each; for a loop over them.
class Groups {
 public:
  Groups(int64_t channels, int64_t inner) : channels_(channels), step_(kGroupColumns / inner) {}

  struct Iterator {
    int64_t first, channels, step;
    Group operator*() const { return {first, std::min(step, channels - first)}; }
    Iterator& operator++() {
      first += step;
      return *this;
    }
    bool operator!=(const Iterator& other) const { return first < other.first; }
  };
  Iterator begin() const { return {0, channels_, step_}; }
  Iterator end() const { return {channels_, channels_, step_}; }

 private:
  int64_t channels_;
  int64_t step_;
};

// Every value `inner` times.
template <typename T>
inline void expand(const T* values, int64_t channels, int64_t inner, T* columns) {
  constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  if (inner == 1) {
    for (int64_t channel = 0; channel < channels; ++channel) columns[channel] = values[channel];
    return;
  }
  // In whole vectors: what is written past a channel's columns is the next one's to overwrite.
  for (int64_t channel = 0; channel < channels; ++channel) {
    const auto value = values[channel] - Vector<T, kLanes>{};
    T* column = columns + channel * inner;
    for (int64_t i = 0; i < inner; i += kLanes) store(column + i, value);
  }
}

}  // namespace
}  // namespace sbp_fast::cpu
