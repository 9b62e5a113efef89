// Rows of a large batch, copied into one dense piece of memory.
//
// Reads may fault pages of a mapped file in, which is why this runs on a thread of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace sbp_fast::prefetch {

// A dimension inside of a row. Strides are in bytes and may be negative.
struct Dimension {
  int64_t count;
  int64_t stride;
};

// Which rows, where they lie, and how a row lies in memory: `inner` dimensions, the last of them
// the fastest, of dense runs of bytes.
struct Rows {
  const char* first = nullptr;     // row 0
  int64_t length = 0;              // rows there are
  int64_t stride = 0;              // bytes from one row to the next
  const int64_t* index = nullptr;  // which of them; nullptr: all, in order
  int64_t count = 0;               // rows wanted
  std::vector<Dimension> inner;
  int64_t run = 0;  // bytes

  int64_t row_bytes() const {
    int64_t bytes = run;
    for (const Dimension& dimension : inner) bytes *= dimension.count;
    return bytes;
  }
};

inline char* gather_box(char* to, const char* from, const Rows& rows, size_t depth) {
  if (depth == rows.inner.size()) {
    std::memcpy(to, from, static_cast<size_t>(rows.run));
    return to + rows.run;
  }
  const Dimension& dimension = rows.inner[depth];
  for (int64_t i = 0; i < dimension.count; ++i) {
    to = gather_box(to, from + i * dimension.stride, rows, depth + 1);
  }
  return to;
}

inline void gather(char* to, const Rows& rows) {
  // 1. Rows that lie one after the other are one run.
  if (rows.index == nullptr && rows.inner.empty() && rows.stride == rows.run) {
    std::memcpy(to, rows.first, static_cast<size_t>(rows.count * rows.run));
    return;
  }
  // 2. Others are copied one by one. The index is the caller's memory, and what was written there
  // since
  //    it was checked must not lead out of the source.
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t row = rows.index == nullptr ? i : rows.index[i];
    if (row < 0 || row >= rows.length) {
      throw std::out_of_range("index[" + std::to_string(i) + "] of a micro-batch is " +
                              std::to_string(row) + "; the source has " +
                              std::to_string(rows.length) +
                              " rows: leave the index as it is until the step has ended");
    }
    to = gather_box(to, rows.first + row * rows.stride, rows, 0);
  }
}

}  // namespace sbp_fast::prefetch
