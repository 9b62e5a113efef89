// The memory bandwidth that the benchmarks measure kernels against: McCalpin's STREAM (copy, scale,
// add, triad), with the two access patterns of this library that STREAM lacks: `update` reads and
// writes one array and reads another, as accumulation does; `read` only reads.
//
// J. D. McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance Computers",
// IEEE TCCA Newsletter, December 1995; https://www.cs.virginia.edu/stream/
//
// The op's schema is sbp_fast/bench/stream_ceiling.py's: it is no part of the library's interface.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#include "../op_arguments.h"
#include "vector.h"

namespace sbp_fast::cpu {
namespace {

constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(float));
constexpr int kUnroll = 64 / kVectorBytes;  // one cache line at a time
constexpr int64_t kLineElements = 64 / sizeof(float);
constexpr int64_t kPieceElements = 65536;
using V = Vector<float, kLanes>;

struct Arrays {
  float* a;
  const float* b;
  const float* c;
  float scale;
};

struct Copy {
  static V compute(const Arrays& x, int64_t i) { return load<V>(x.b + i); }
};
struct Scale {
  static V compute(const Arrays& x, int64_t i) { return x.scale * load<V>(x.b + i); }
};
struct Add {
  static V compute(const Arrays& x, int64_t i) { return load<V>(x.b + i) + load<V>(x.c + i); }
};
struct Triad {
  static V compute(const Arrays& x, int64_t i) {
    return load<V>(x.b + i) + x.scale * load<V>(x.c + i);
  }
};
struct Update {
  static V compute(const Arrays& x, int64_t i) {
    return load<V>(x.a + i) + x.scale * load<V>(x.b + i);
  }
};

// A kernel on elements [begin, end), a whole number of cache lines. kStreaming: the array written
// is not read, so its lines need not be fetched.
template <typename Kernel, bool kStreaming>
void write(const Arrays& arrays, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; line += kLineElements) {
#pragma GCC unroll 4
    for (int part = 0; part < kUnroll; ++part) {
      const int64_t i = line + part * kLanes;
      const V value = Kernel::compute(arrays, i);
      if constexpr (kStreaming) {
        store_streaming(arrays.a + i, value);
      } else {
        store(arrays.a + i, value);
      }
    }
  }
  if constexpr (kStreaming) finish_streaming();
}

void read(const Arrays& arrays, int64_t begin, int64_t end) {
  V sums[4] = {};
  for (int64_t line = begin; line < end; line += kLineElements) {
#pragma GCC unroll 4
    for (int part = 0; part < kUnroll; ++part) {
      sums[part] += load<V>(arrays.b + line + part * kLanes);
    }
  }
  // Keeps the sums from being optimised away.
  asm volatile("" : : "m"(sums));
}

using StreamKernel = void (*)(const Arrays& arrays, int64_t begin, int64_t end);

StreamKernel find(const std::string& name) {
  if (name == "copy") return write<Copy, true>;
  if (name == "scale") return write<Scale, true>;
  if (name == "add") return write<Add, true>;
  if (name == "triad") return write<Triad, true>;
  if (name == "update") return write<Update, false>;
  if (name == "read") return read;
  STD_TORCH_CHECK(false, "_stream_kernel: kernel is '", name,
                  "'; it must be one of copy, scale, add, triad, update, read");
}

void check_array(const char* name, const TensorView& array, const TensorView& first) {
  STD_TORCH_CHECK(array.dtype == ScalarType::Float && array.contiguous &&
                      array.numel == first.numel && array.numel % kLineElements == 0 &&
                      reinterpret_cast<uintptr_t>(array.const_data<char>()) % 64 == 0,
                  "_stream_kernel: ", name, " is a ", dtype_text(array.dtype), " tensor of ",
                  array.numel,
                  " elements; it must be torch.float32, contiguous, begin at a "
                  "multiple of 64 bytes and have as many elements as a, a multiple of ",
                  kLineElements);
}

void stream_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const TensorView a = read_one_tensor(stack[0]);
  const TensorView b = read_one_tensor(stack[1]);
  const TensorView c = read_one_tensor(stack[2]);
  const auto scale = static_cast<float>(torch::stable::detail::to<double>(stack[3]));
  const StreamKernel kernel = find(torch::stable::detail::to<std::string>(stack[4]));
  check_array("a", a, a);
  check_array("b", b, a);
  check_array("c", c, a);
  const Arrays arrays{a.mutable_data<float>(), b.const_data<float>(), c.const_data<float>(), scale};
  const int64_t elements = a.numel;

  // Pieces go to threads as they come free, as in ops.cpp: a thread that is held up holds up no
  // other.
  std::atomic<int64_t> next{0};
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(kPieceElements); begin < elements;
         begin = next.fetch_add(kPieceElements)) {
      kernel(arrays, begin, std::min(begin + kPieceElements, elements));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CPU, library) {
  library.impl("_stream_kernel", &stream_kernel);
}

}  // namespace sbp_fast::cpu
