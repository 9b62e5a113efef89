// Lists of tensors as the ops receive them, read once into plain structs, and the checks that every
// native op makes before it touches an element. The words are those of sbp_fast/ops/checks.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "dtypes.h"

namespace sbp_fast {

inline void check_status(AOTITorchError status, const char* call) {
  STD_TORCH_CHECK(status == AOTI_TORCH_SUCCESS, "sbp_fast: ", call, " failed inside PyTorch");
}
#define SBP_FAST_CHECK(call) ::sbp_fast::check_status((call), #call)

struct TensorHandleDeleter {
  void operator()(AtenTensorOpaque* handle) const { aoti_torch_delete_tensor_object(handle); }
};
using OwnedTensor = std::unique_ptr<AtenTensorOpaque, TensorHandleDeleter>;

// One tensor. Pointers are borrowed from `handle`, which keeps the tensor alive.
// torch::stable::Tensor would cost one more allocation per tensor, and a call takes thousands of
// them.
struct TensorView {
  OwnedTensor handle;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t dim = 0;
  int64_t numel = 0;
  ScalarType dtype = ScalarType::Undefined;
  int32_t device_type = 0;
  int32_t device_index = 0;
  bool strided = false;
  bool contiguous = false;
  // Null until a check has asked for them.
  const void* known_data = nullptr;
  void* known_mutable_data = nullptr;

  template <typename T>
  const T* const_data() const {
    const void* data = known_data;
    if (!data) SBP_FAST_CHECK(torch_get_const_data_ptr(handle.get(), &data));
    return static_cast<const T*>(data);
  }
  template <typename T>
  T* mutable_data() const {
    void* data = known_mutable_data;
    if (!data) SBP_FAST_CHECK(torch_get_mutable_data_ptr(handle.get(), &data));
    return static_cast<T*>(data);
  }
};

using TensorViews = std::vector<TensorView>;

inline std::string shape_text(const int64_t* values, int64_t dim) {
  std::ostringstream text;
  text << '(';
  for (int64_t d = 0; d < dim; ++d) text << (d ? ", " : "") << values[d];
  text << (dim == 1 ? ",)" : ")");
  return text.str();
}

inline std::string device_text(const TensorView& tensor) {
  if (tensor.device_type == aoti_torch_device_type_cpu()) return "cpu";
  const std::string kind =
      tensor.device_type == aoti_torch_device_type_cuda() ? "cuda:" : "device:";
  return kind + std::to_string(tensor.device_index);
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    default: return torch::headeronly::toString(dtype);
  }
}

inline bool is_row_major(const TensorView& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim; d-- > 0;) {
    if (tensor.sizes[d] == 1) continue;
    if (tensor.strides[d] != expected) return false;
    expected *= tensor.sizes[d];
  }
  return true;
}

// Takes ownership and refuses nothing: an exception here would leak the arguments still on the
// stack. Every call into PyTorch costs, and lists are long: what follows from sizes and strides is
// worked out here.
inline TensorView read_tensor(AtenTensorHandle owned) {
  TensorView view;
  view.handle.reset(owned);
  int32_t layout = 0;
  int32_t dtype = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  SBP_FAST_CHECK(aoti_torch_get_layout(owned, &layout));
  SBP_FAST_CHECK(aoti_torch_get_dtype(owned, &dtype));
  SBP_FAST_CHECK(aoti_torch_get_dim(owned, &view.dim));
  SBP_FAST_CHECK(aoti_torch_get_sizes(owned, &sizes));
  SBP_FAST_CHECK(aoti_torch_get_device_type(owned, &view.device_type));
  if (view.device_type != aoti_torch_device_type_cpu()) {
    SBP_FAST_CHECK(aoti_torch_get_device_index(owned, &view.device_index));
  }
  view.sizes = sizes;
  view.numel = 1;
  for (int64_t d = 0; d < view.dim; ++d) view.numel *= sizes[d];
  view.strided = layout == aoti_torch_layout_strided();
  if (view.strided) {
    SBP_FAST_CHECK(aoti_torch_get_strides(owned, &strides));
    view.strides = strides;
    view.contiguous = view.numel == 0 || is_row_major(view);
  }
  // The shim's dtype codes are ScalarType's own values.
  view.dtype = static_cast<ScalarType>(dtype);
  return view;
}

// Takes the list off the op's argument stack and empties it.
inline TensorViews read_tensors(StableIValue argument) {
  const auto list = torch::stable::detail::to<StableListHandle>(argument);
  struct ListOwner {
    StableListHandle list;
    ~ListOwner() { torch_delete_list(list); }
  } owner{list};
  size_t size = 0;
  SBP_FAST_CHECK(torch_list_size(list, &size));
  TensorViews views;
  views.reserve(size);
  for (size_t index = 0; index < size; ++index) {
    StableIValue element;
    SBP_FAST_CHECK(torch_list_get_item(list, index, &element));
    views.push_back(read_tensor(torch::stable::detail::to<AtenTensorHandle>(element)));
  }
  return views;
}

inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.device_type == b.device_type && a.device_index == b.device_index;
}

inline void check_one_device(const char* op, const char* name, const TensorViews& tensors,
                             const char* first_name, const TensorView& first) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(same_device(tensors[i], first), op, ": ", name, "[", i, "] is on ",
                    device_text(tensors[i]), " but ", first_name, "[0] is on ", device_text(first),
                    "; all tensors of a call must share one device");
  }
}

inline void check_pairs(const char* op, const char* left_name, const TensorViews& left,
                        const char* right_name, const TensorViews& right) {
  STD_TORCH_CHECK(left.size() == right.size(), op, ": ", left.size(), " ", left_name, " but ",
                  right.size(), " ", right_name, "; the lists must have the same length");
  for (size_t i = 0; i < left.size(); ++i) {
    const TensorView& a = left[i];
    const TensorView& b = right[i];
    STD_TORCH_CHECK(a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes), op, ": ",
                    left_name, "[", i, "] has shape ", shape_text(a.sizes, a.dim), " but ",
                    right_name, "[", i, "] has shape ", shape_text(b.sizes, b.dim),
                    "; the shapes must be equal");
  }
  if (left.empty()) return;
  check_one_device(op, left_name, left, left_name, left[0]);
  check_one_device(op, right_name, right, left_name, left[0]);
}

inline bool is_accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double;
}

inline bool is_gradient_dtype(ScalarType dtype) {
  return is_accumulator_dtype(dtype) || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

template <typename... Name>
void check_layout(const char* op, const TensorView& tensor, const Name&... name) {
  STD_TORCH_CHECK(tensor.strided, op, ": ", name...,
                  " is not in the layout torch.strided; it must be dense, call .to_dense() on it "
                  "first");
}

inline void check_dtypes(const char* op, const char* name, const TensorViews& tensors,
                         bool (*allowed)(ScalarType), const char* allowed_text) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_layout(op, tensors[i], name, "[", i, "]");
    STD_TORCH_CHECK(allowed(tensors[i].dtype), op, ": ", name, "[", i, "] has dtype ",
                    dtype_text(tensors[i].dtype), "; it must be one of ", allowed_text);
  }
}

inline constexpr const char* kAccumulatorDtypes = "torch.float32, torch.float64";
inline constexpr const char* kGradientDtypes =
    "torch.float32, torch.float64, torch.bfloat16, torch.float16";

// Dimensions of more than one element, from the smallest stride to the largest.
inline std::vector<std::pair<int64_t, int64_t>> strides_in_order(const TensorView& tensor) {
  std::vector<std::pair<int64_t, int64_t>> order;
  for (int64_t d = 0; d < tensor.dim; ++d) {
    if (tensor.sizes[d] > 1) order.emplace_back(tensor.strides[d], tensor.sizes[d]);
  }
  std::sort(order.begin(), order.end());
  return order;
}

// True where two indices may reach one address (an expanded tensor, say).
inline bool overlaps_itself(const TensorView& tensor) {
  if (tensor.contiguous || tensor.numel == 0) return false;
  int64_t reach = 1;
  for (const auto& [stride, size] : strides_in_order(tensor)) {
    if (stride < reach) return true;
    reach += stride * (size - 1);
  }
  return false;
}

// True where the elements fill one range of memory without gaps, in whatever order of dimensions.
inline bool is_dense(const TensorView& tensor) {
  if (tensor.contiguous) return true;
  int64_t expected = 1;
  for (const auto& [stride, size] : strides_in_order(tensor)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// True where element k in memory order is the same element in both: one flat loop serves.
inline bool is_flat_pair(const TensorView& a, const TensorView& b) {
  if (a.contiguous && b.contiguous) return true;
  if (!is_dense(a)) return false;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

inline void check_written(const char* op, const char* name, const TensorViews& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& tensor = tensors[i];
    STD_TORCH_CHECK(!overlaps_itself(tensor), op, ": ", name, "[", i, "] has shape ",
                    shape_text(tensor.sizes, tensor.dim), " and strides ",
                    shape_text(tensor.strides, tensor.dim),
                    ", so that elements share memory; pass a .clone() of it");
  }
}

// True where both are the very same elements: an op in place, element by element.
inline bool is_same_memory(const TensorView& a, const TensorView& b) {
  if (a.known_data != b.known_data || a.dtype != b.dtype) return false;
  if (a.contiguous && b.contiguous) return true;
  for (int64_t d = 0; d < a.dim; ++d) {
    if (a.sizes[d] > 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// A stretch of memory. Positions count through the list of what is written, then through that of
// what is read.
struct MemoryRange {
  const char* begin;
  const char* end;
  size_t position;
};

// A tensor with gaps may be interleaved with others: only its first element is sure to be its own.
inline MemoryRange range_of(const TensorView& tensor, size_t position) {
  const auto* begin = static_cast<const char*>(tensor.known_data);
  const int64_t elements = is_dense(tensor) ? tensor.numel : 1;
  return {begin, begin + elements * bytes_per_element(tensor.dtype), position};
}

// Names the range at `current` and the first before it that it must not meet.
[[noreturn]] inline void refuse_shared(const char* op, const char* written_name,
                                       size_t written_count, const char* read_name,
                                       const std::vector<MemoryRange>& ranges, size_t current) {
  const MemoryRange& range = ranges[current];
  const auto is_written = [&](const MemoryRange& any) { return any.position < written_count; };
  const MemoryRange& other = *std::find_if(ranges.begin(), ranges.end(), [&](const auto& earlier) {
    return earlier.end > range.begin && (is_written(earlier) || is_written(range));
  });
  const size_t first = std::min(range.position, other.position);
  const size_t second = std::max(range.position, other.position);
  STD_TORCH_CHECK(second >= written_count, op, ": ", written_name, "[", first, "] and ",
                  written_name, "[", second, "] share memory; pass each tensor once");
  STD_TORCH_CHECK(false, op, ": ", written_name, "[", first, "] and ", read_name, "[",
                  second - written_count, "] share memory; pass a .clone() of ", read_name, "[",
                  second - written_count, "]");
  std::abort();  // unreachable: the check above throws
}

// Chunks are written in no particular order, so what is written may share memory with nothing but
// its own counterpart, element by element. One sort of all ranges finds the rest.
inline void check_separate(const char* op, const char* written_name, TensorViews& written,
                           const char* read_name, TensorViews& read) {
  std::vector<MemoryRange> ranges;
  ranges.reserve(written.size() + read.size());
  // For writing, and before what is read: a copy that PyTorch put off is made now, elsewhere.
  for (size_t i = 0; i < written.size(); ++i) {
    TensorView& tensor = written[i];
    tensor.known_data = tensor.known_mutable_data = tensor.mutable_data<void>();
    if (tensor.numel > 0) ranges.push_back(range_of(tensor, i));
  }
  for (size_t i = 0; i < read.size(); ++i) {
    TensorView& tensor = read[i];
    tensor.known_data = tensor.const_data<void>();
    if (tensor.numel == 0 || is_same_memory(written[i], tensor)) continue;
    ranges.push_back(range_of(tensor, written.size() + i));
  }
  const auto is_before = [](const MemoryRange& a, const MemoryRange& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.position < b.position;
  };
  std::sort(ranges.begin(), ranges.end(), is_before);
  const char* written_end = nullptr;
  const char* any_end = nullptr;
  for (size_t i = 0; i < ranges.size(); ++i) {
    const MemoryRange& range = ranges[i];
    const bool is_written = range.position < written.size();
    if (range.begin < (is_written ? any_end : written_end)) {
      refuse_shared(op, written_name, written.size(), read_name, ranges, i);
    }
    any_end = std::max(any_end, range.end);
    if (is_written) written_end = std::max(written_end, range.end);
  }
}

inline void check_same_device(const char* op, const char* name, const TensorView& value,
                              const TensorViews& tensors) {
  if (tensors.empty()) return;
  STD_TORCH_CHECK(same_device(value, tensors[0]), op, ": ", name, " is on ", device_text(value),
                  " but the tensors are on ", device_text(tensors[0]),
                  "; all tensors of a call must share one device");
}

inline constexpr int64_t kStatisticsSize = 3;

inline void check_statistics(const char* op, const TensorView& statistics,
                             const TensorViews& tensors) {
  check_layout(op, statistics, "statistics");
  STD_TORCH_CHECK(statistics.dtype == ScalarType::Double && statistics.dim == 1 &&
                      statistics.numel == kStatisticsSize && statistics.contiguous,
                  op, ": statistics is a ", dtype_text(statistics.dtype), " tensor of shape ",
                  shape_text(statistics.sizes, statistics.dim),
                  "; it must be contiguous, torch.float64, of shape (", kStatisticsSize, ",)");
  check_same_device(op, "statistics", statistics, tensors);
}

inline void check_scalar(const char* op, const char* name, const TensorView& value,
                         const TensorViews& tensors) {
  check_layout(op, value, name);
  STD_TORCH_CHECK(value.dtype == ScalarType::Double && value.dim == 0, op, ": ", name, " is a ",
                  dtype_text(value.dtype), " tensor of shape ", shape_text(value.sizes, value.dim),
                  "; it must be a torch.float64 tensor of no dimensions");
  check_same_device(op, name, value, tensors);
}

}  // namespace sbp_fast
