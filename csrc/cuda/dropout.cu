// sbp_fast::dropout on CUDA tensors.
#include "../dropout_call.h"
#include "dropout.cuh"

#ifdef SBP_FAST_CUDA_EMULATION
#include "../emulation/device.h"
#else
#include "device.h"
#endif

namespace sbp_fast::cuda {
namespace {

int64_t blocks_for(int64_t count, int64_t of_one_block) {
  return (count + of_one_block - 1) / of_one_block;
}

bool are_aligned(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;
}

void drop_rows(void* to, const void* from, const DropoutArguments& arguments) {
  const DropoutRows rows = arguments.rows();
  const bool wide = rows.inner % kDropoutGroup == 0 && are_aligned(to, from);
  const Device device(arguments.view);
  with_gradient_type(arguments.view.dtype, [&]<typename T>() {
    constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));
    device.launch("dropout_rows", wide ? dropout_rows<T, kWidth> : dropout_rows<T, 1>,
                  blocks_for(arguments.view.numel, kDropoutChunk), static_cast<T*>(to),
                  static_cast<const T*>(from), arguments.view.numel, rows, arguments.mask);
  });
}

void drop_channels_last(void* to, const void* from, const DropoutArguments& arguments,
                        const DropoutChannelsLast& layout) {
  const Device device(arguments.view);
  with_gradient_type(arguments.view.dtype, [&]<typename T>() {
    // Noise of more than four channels would not fit the registers.
    constexpr int kMost = kVectorBytes / static_cast<int>(sizeof(T));
    constexpr int kWidth = kMost < 4 ? kMost : 4;
    const bool wide = layout.channels % kWidth == 0 && layout.positions % kDropoutGroup == 0 &&
                      are_aligned(to, from);
    const int width = wide ? kWidth : 1;
    const int64_t items = arguments.samples * layout.groups() * (layout.channels / width);
    device.launch("dropout_channels_last",
                  wide ? dropout_channels_last<T, kWidth> : dropout_channels_last<T, 1>,
                  blocks_for(items, kDropoutChunk / (kDropoutGroup * width)), static_cast<T*>(to),
                  static_cast<const T*>(from), arguments.samples, layout, arguments.mask);
  });
}

void dropout(StableIValue* stack, uint64_t, uint64_t) {
  call_dropout(stack, drop_rows, drop_channels_last);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CUDA, library) { library.impl("dropout", &dropout); }

}  // namespace sbp_fast::cuda
