// One call of an op: its tensors as a plan, the plan on the device, and one launch per pair of
// dtypes.
#pragma once

#include "../op_arguments.h"
#include "plan.h"

#ifdef SBP_FAST_CUDA_EMULATION
#include "../emulation/device.h"
#else
#include "device.h"
#endif

namespace sbp_fast::cuda {

// Refuses what the strided kernels have no room for. `op` and the names are for the message.
inline Pair checked_pair(const char* op, const char* names, size_t position, void* written_data,
                         const TensorView& written, const void* read_data, const TensorView& read) {
  Pair pair;
  pair.written = written_data;
  pair.read = read_data;
  pair.written_dtype = written.dtype;
  pair.read_dtype = read.dtype;
  pair.numel = written.numel;
  pair.flat = is_flat_pair(written, read);
  pair.dim = written.dim;
  pair.sizes = written.sizes;
  pair.written_strides = written.strides;
  pair.read_strides = read.strides;
  if (!pair.flat) {
    const int64_t dims = merge_dimensions(pair).dims;
    STD_TORCH_CHECK(dims <= kMaxDims, op, ": ", names, " at position ", position, " have shape ",
                    shape_text(written.sizes, written.dim), " and strides ",
                    shape_text(written.strides, written.dim), " and ",
                    shape_text(read.strides, read.dim), ", which leaves ", dims,
                    " dimensions to walk; at most ", kMaxDims,
                    " are supported on CUDA, call .contiguous() on them first");
  }
  return pair;
}

inline Plan plan_call(const char* op, const char* names, const TensorViews& written,
                      const TensorViews& read) {
  std::vector<Pair> pairs;
  pairs.reserve(written.size());
  for (size_t i = 0; i < written.size(); ++i) {
    pairs.push_back(checked_pair(op, names, i, written[i].mutable_data<void>(), written[i],
                                 read[i].const_data<void>(), read[i]));
  }
  return make_plan(pairs);
}

// The plan's tables on the device: one block of pinned memory, one copy.
class Tables {
 public:
  Tables(const Device& device, const Plan& plan)
      : strided_pairs_at_(bytes_of(plan.flat_chunks)),
        strided_chunks_at_(strided_pairs_at_ + bytes_of(plan.strided_pairs)),
        uploaded_(device.upload(stage(device, plan))),
        base_(static_cast<const char*>(uploaded_.const_data_ptr())) {}

  const FlatChunk* flat_chunks() const { return reinterpret_cast<const FlatChunk*>(base_); }
  const StridedPair* strided_pairs() const {
    return reinterpret_cast<const StridedPair*>(base_ + strided_pairs_at_);
  }
  const Chunk* strided_chunks() const {
    return reinterpret_cast<const Chunk*>(base_ + strided_chunks_at_);
  }

 private:
  template <typename Row>
  static int64_t bytes_of(const std::vector<Row>& rows) {
    return static_cast<int64_t>(rows.size() * sizeof(Row));
  }

  torch::stable::Tensor stage(const Device& device, const Plan& plan) const {
    torch::stable::Tensor staged =
        device.staging(strided_chunks_at_ + bytes_of(plan.strided_chunks));
    auto* base = static_cast<char*>(staged.mutable_data_ptr());
    copy_rows(base, plan.flat_chunks);
    copy_rows(base + strided_pairs_at_, plan.strided_pairs);
    copy_rows(base + strided_chunks_at_, plan.strided_chunks);
    return staged;
  }

  template <typename Row>
  static void copy_rows(char* to, const std::vector<Row>& rows) {
    if (!rows.empty()) memcpy(to, rows.data(), rows.size() * sizeof(Row));
  }

  int64_t strided_pairs_at_;
  int64_t strided_chunks_at_;
  torch::stable::Tensor uploaded_;
  const char* base_;
};

}  // namespace sbp_fast::cuda
