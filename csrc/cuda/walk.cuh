// How the threads of a block walk over one chunk. Each warp-wide access covers whole 32-byte
// sectors: the wider of the two types moves 16 bytes per thread, the narrower one the same number
// of elements.
#pragma once

#include <cstdint>

#include "../arithmetic.h"
#include "plan.h"

namespace sbp_fast::cuda {

// Threads per block of every launch. Kernels read blockDim and need a multiple of 32.
inline constexpr int kThreads = 256;

// Independent accesses that a thread issues before it uses the first.
inline constexpr int kUnroll = 4;

inline constexpr int kVectorBytes = 16;

// Promised to the compiler, which may then use up to 64 registers per thread: left alone it goes
// down to 32 for the sake of occupancy and spills, where 1,024 threads keep enough bytes in flight.
inline constexpr int kBlocksPerMultiprocessor = 4;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T values[kWidth];
};

template <typename a_t, typename b_t>
inline constexpr int kVectorWidth =
    kVectorBytes / static_cast<int>(sizeof(a_t) > sizeof(b_t) ? sizeof(a_t) : sizeof(b_t));

// A pointer that was itself loaded from memory may point anywhere as far as the compiler knows,
// which costs it the accesses that are made for global memory.
template <typename T, typename Data>
__device__ __forceinline__ T* global_pointer(Data* data) {
  __builtin_assume(__isGlobal(data));
  return static_cast<T*>(data);
}

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <int kWidth, typename T>
__device__ __forceinline__ void store(T* to, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
}

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0;
}

// Gives this thread's share of the elements [begin, end) to
//   visit.operator()<kWidth, kCount>(first, step)
// which handles kCount vectors of kWidth elements, the k-th one starting at first + k * step. Both
// are compile-time constants, so that what visit loads stays in registers. Elements that fill no
// whole vector are left out; returns where they begin. Offsets within a chunk fit 32 bits.
template <int kWidth, typename Visit>
__device__ __forceinline__ int walk_vectors(int begin, int end, const Visit& visit) {
  const int vectors = (end - begin) / kWidth;
  const int threads = static_cast<int>(blockDim.x);
  int vector = static_cast<int>(threadIdx.x);
  for (; vector + (kUnroll - 1) * threads < vectors; vector += kUnroll * threads) {
    visit.template operator()<kWidth, kUnroll>(begin + vector * kWidth, threads * kWidth);
  }
  for (; vector < vectors; vector += threads) {
    visit.template operator()<kWidth, 1>(begin + vector * kWidth, 0);
  }
  return begin + vectors * kWidth;
}

// A whole chunk: vectors where both pointers allow it, single elements for the rest.
template <int kWidth, typename Visit>
__device__ __forceinline__ void walk_chunk(const FlatChunk& chunk, const Visit& visit) {
  const int count = static_cast<int>(chunk.count);
  const bool aligned = is_aligned(chunk.written) && is_aligned(chunk.read);
  const int rest = aligned ? walk_vectors<kWidth>(0, count, visit) : 0;
  walk_vectors<1>(rest, count, visit);
}

// Where an element of a strided pair lies, in elements from each tensor's start.
struct Location {
  int64_t written;
  int64_t read;
};

__device__ __forceinline__ Location locate(const StridedPair& pair, int64_t element) {
  Location location{0, 0};
  for (int64_t d = pair.dims - 1; d >= 0; --d) {
    const int64_t index = element % pair.sizes[d];
    element /= pair.sizes[d];
    location.written += index * pair.written_strides[d];
    location.read += index * pair.read_strides[d];
  }
  return location;
}

// Calls visit(location) for this thread's share of a chunk of a strided pair.
template <typename Visit>
__device__ __forceinline__ void walk_strided(const StridedPair& pair, const Chunk& chunk,
                                             const Visit& visit) {
  for (int64_t i = threadIdx.x; i < chunk.count; i += blockDim.x) {
    visit(locate(pair, chunk.begin + i));
  }
}

}  // namespace sbp_fast::cuda
