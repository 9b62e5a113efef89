// One parallel region per call, work handed out as threads come free.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sbp_fast::cpu {

// Calls smaller than this are done before a second thread would have woken up.
inline constexpr int64_t kSerialElements = 65536;

// Calls process(i) for every i below `count`, in any order; a thread takes `per_turn` at a time.
template <typename Process>
void for_each_in_parallel(int64_t count, int64_t per_turn, int64_t elements, Process process) {
  if (elements <= kSerialElements) {
    for (int64_t i = 0; i < count; ++i) process(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first = next.fetch_add(per_turn); first < count;
         first = next.fetch_add(per_turn)) {
      const int64_t last = std::min(first + per_turn, count);
      for (int64_t i = first; i < last; ++i) process(i);
    }
  });
}

}  // namespace sbp_fast::cpu
