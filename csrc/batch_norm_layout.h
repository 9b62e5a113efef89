// How batch norm sees a tensor in memory, whatever the order of its dimensions, and the tensors
// that its ops make.
#pragma once

#include "tensor_list.h"

namespace sbp_fast {

// A dense tensor of shape (N, C, ...) is `outer` times `channels` runs of `inner` elements, in this
// order in memory: contiguous it has inner = the pixels of an image, with channels last inner = 1.
// Tensors of one shape whose strides are equal agree element by element.
struct ChannelExtents {
  int64_t outer = 0;
  int64_t channels = 0;
  int64_t inner = 0;

  int64_t numel() const { return outer * channels * inner; }
};

inline ChannelExtents channel_extents(const TensorView& dense) {
  if (dense.sizes[1] == 1) return {1, 1, dense.numel};
  ChannelExtents extents{1, dense.sizes[1], 1};
  for (int64_t d = 0; d < dense.dim; ++d) {
    if (d == 1 || dense.sizes[d] == 1) continue;
    (dense.strides[d] < dense.strides[1] ? extents.inner : extents.outer) *= dense.sizes[d];
  }
  return extents;
}

// Uninitialised; what torch.empty_like makes of a dense tensor.
inline TensorView new_like(const TensorView& dense) {
  AtenTensorHandle created = nullptr;
  SBP_FAST_CHECK(aoti_torch_empty_strided(dense.dim, dense.sizes, dense.strides,
                                          static_cast<int32_t>(dense.dtype), dense.device_type,
                                          dense.device_index, &created));
  return read_tensor(created);
}

// Uninitialised; two rows of float64, one column per channel of `input`.
inline TensorView new_sums(const TensorView& input) {
  const std::array<int64_t, 2> sizes{2, input.sizes[1]};
  const std::array<int64_t, 2> strides{input.sizes[1], 1};
  AtenTensorHandle created = nullptr;
  SBP_FAST_CHECK(aoti_torch_empty_strided(2, sizes.data(), strides.data(),
                                          static_cast<int32_t>(ScalarType::Double),
                                          input.device_type, input.device_index, &created));
  return read_tensor(created);
}

// The tensor itself, or a copy without gaps, with the strides that torch.empty_like would give it.
inline TensorView made_dense(TensorView tensor) {
  if (is_dense(tensor)) return tensor;
  AtenTensorHandle copy = nullptr;
  SBP_FAST_CHECK(aoti_torch_clone(tensor.handle.get(), &copy));
  return read_tensor(copy);
}

// The tensor itself, or a copy whose elements lie in the order of those of `dense`.
inline TensorView made_alike(TensorView tensor, const TensorView& dense) {
  if (is_flat_pair(dense, tensor)) return tensor;
  TensorView copy = new_like(dense);
  SBP_FAST_CHECK(aoti_torch_copy_(copy.handle.get(), tensor.handle.get(), /*non_blocking=*/1));
  return copy;
}

// Leaves an op's result where the dispatcher looks for it.
inline void return_tensor(StableIValue* stack, TensorView result) {
  stack[0] = torch::stable::detail::from(result.handle.release());
}

}  // namespace sbp_fast
