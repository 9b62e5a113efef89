// The tensors that the kernels are checked on: sizes around the widths at which they switch loops,
// pointers aligned and not, and pairs whose elements lie in different orders.
#pragma once

#include <numeric>

#include "../cuda/walk.cuh"
#include "check.h"

namespace sbp_fast::check {

// Two warps: the fewest that have something to add up. A chunk then takes one turn of the unrolled
// loop and some of the others at every width, and begins on a 16-byte boundary as the real ones do.
inline constexpr unsigned kThreads = 64;
inline constexpr int64_t kChunk = 2304;

struct Case {
  int64_t numel;
  // Elements by which each tensor misses a 16-byte boundary.
  int64_t written_offset;
  int64_t read_offset;
  // For tensors in different orders; empty for flat pairs.
  std::vector<int64_t> sizes = {};
  std::vector<int64_t> written_strides = {};
  std::vector<int64_t> read_strides = {};
};

inline std::vector<Case> cases() {
  std::vector<Case> all;
  for (const int64_t numel : {0, 1, 7, 64, 1025, 2304, 2305, 4999}) all.push_back({numel, 0, 0});
  all.push_back({4999, 1, 0});
  all.push_back({2305, 0, 1});
  all.push_back({7, 3, 3});
  // A matrix with gaps between its rows, a transposed one, three dimensions in another order, and
  // one that repeats its elements.
  all.push_back({5 * 6, 0, 1, {5, 6}, {8, 1}, {6, 1}});
  all.push_back({41 * 61, 0, 0, {41, 61}, {61, 1}, {1, 41}});
  all.push_back({3 * 5 * 7, 1, 0, {3, 5, 7}, {35, 7, 1}, {5, 1, 15}});
  all.push_back({4 * 9, 0, 1, {4, 9}, {9, 1}, {0, 1}});
  // As many dimensions as the kernels take.
  all.push_back({256,
                 0,
                 0,
                 {2, 2, 2, 2, 2, 2, 2, 2},
                 {128, 64, 32, 16, 8, 4, 2, 1},
                 {1, 2, 4, 8, 16, 32, 64, 128}});
  return all;
}

// Both tensors of a case, filled.
template <typename written_t, typename read_t>
struct Tensors {
  Tensors(const Case& described, std::mt19937_64& random)
      : layout(described),
        written(extent(described, described.written_strides), described.written_offset, random),
        read(extent(described, described.read_strides), described.read_offset, random) {}

  static int64_t extent(const Case& described, const std::vector<int64_t>& strides) {
    if (strides.empty()) return described.numel;
    int64_t last = 0;
    for (size_t d = 0; d < strides.size(); ++d) last += (described.sizes[d] - 1) * strides[d];
    return last + 1;
  }

  cuda::Pair pair() const {
    return {written.data(),
            read.data(),
            kDtype<written_t>,
            kDtype<read_t>,
            layout.numel,
            layout.sizes.empty(),
            static_cast<int64_t>(layout.sizes.size()),
            layout.sizes.data(),
            layout.written_strides.data(),
            layout.read_strides.data()};
  }

  // Calls visit(position in written, position in read) for every element.
  template <typename Visit>
  void for_each(Visit visit) const {
    for (int64_t element = 0; element < layout.numel; ++element) {
      int64_t to = element;
      int64_t from = element;
      if (!layout.sizes.empty()) {
        to = from = 0;
        int64_t rest = element;
        for (size_t d = layout.sizes.size(); d-- > 0;) {
          const int64_t index = rest % layout.sizes[d];
          rest /= layout.sizes[d];
          to += index * layout.written_strides[d];
          from += index * layout.read_strides[d];
        }
      }
      visit(to, from);
    }
  }

  // Nothing was written but the elements of the tensor that is to be written.
  void check_guards(const std::string& what) const {
    std::vector<bool> may_change(written.count(), false);
    for_each([&](int64_t to, int64_t) { may_change[to] = true; });
    written.check_unchanged(what + " (written)",
                            [&](int64_t i) { return i >= 0 && may_change[i]; });
    read.check_unchanged(what + " (read)", [](int64_t) { return false; });
  }

  Case layout;
  Buffer<written_t> written;
  Buffer<read_t> read;
};

template <typename written_t, typename read_t>
std::vector<Tensors<written_t, read_t>> make_tensors(std::mt19937_64& random) {
  std::vector<Tensors<written_t, read_t>> tensors;
  for (const Case& one : cases()) tensors.emplace_back(one, random);
  return tensors;
}

template <typename written_t, typename read_t>
cuda::Plan plan_of(const std::vector<Tensors<written_t, read_t>>& tensors) {
  std::vector<cuda::Pair> pairs;
  for (const auto& tensor : tensors) pairs.push_back(tensor.pair());
  return cuda::make_plan(pairs, kChunk);
}

}  // namespace sbp_fast::check
