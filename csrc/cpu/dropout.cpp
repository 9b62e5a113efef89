// sbp_fast::dropout on CPU tensors: one parallel region per call, parts handed out as threads come
// free.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "../dropout_call.h"
#include "dropout_kernels.h"

namespace sbp_fast::cpu {
namespace {

// A thread takes this many elements at a time: noise for them takes far longer than to ask for the
// next ones.
constexpr int64_t kPartElements = 16384;

// That of the instruction set that dispatch.cpp chose.
const DropoutTable& table() {
#ifdef SBP_FAST_X86
  for (const DropoutTable* one : {&avx512_dropout, &avx2_dropout}) {
    if (std::strcmp(one->instruction_set, kernels().instruction_set) == 0) return *one;
  }
#endif
  return baseline_dropout;
}

// Calls process(begin, end) for parts of [0, count) of at most `part`.
template <typename Process>
void in_parts(int64_t count, int64_t part, const Process& process) {
  if (count <= part) return process(0, count);
  std::atomic<int64_t> next{0};
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(part); begin < count; begin = next.fetch_add(part)) {
      process(begin, std::min(begin + part, count));
    }
  });
}

void drop_rows(void* to, const void* from, const DropoutArguments& arguments) {
  const DropoutRowsKernel kernel = table().rows[dtype_index(arguments.view.dtype)];
  in_parts(arguments.view.numel, kPartElements, [&](int64_t begin, int64_t end) {
    kernel(to, from, begin, end, arguments.rows(), arguments.mask);
  });
}

void drop_channels_last(void* to, const void* from, const DropoutArguments& arguments,
                        const DropoutChannelsLast& layout) {
  const DropoutChannelsLastKernel kernel = table().channels_last[dtype_index(arguments.view.dtype)];
  const int64_t part = std::max(kPartElements / (kDropoutGroup * layout.channels), int64_t{1});
  in_parts(arguments.samples * layout.groups(), part, [&](int64_t begin, int64_t end) {
    kernel(to, from, begin, end, layout, arguments.mask);
  });
}

void dropout(StableIValue* stack, uint64_t, uint64_t) {
  call_dropout(stack, drop_rows, drop_channels_last);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CPU, library) { library.impl("dropout", &dropout); }

}  // namespace sbp_fast::cpu
