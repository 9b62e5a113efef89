// As much of CUDA as the kernels use, on the host: a block's threads are real threads, one block
// runs at a time, and __syncthreads and the warp shuffles are barriers. So the sanitizers see the
// kernels' own source, and a barrier that is missing there is a data race here.
//
// Given to the compiler with -include, before anything else, as nvcc does with its own header.
#pragma once

#define SBP_FAST_CUDA_EMULATION 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __builtin_assume(condition) static_cast<void>(condition)
#define __isGlobal(pointer) ((pointer) != nullptr)

#include <atomic>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

struct EmulatedDim {
  unsigned x = 0;
};

inline thread_local EmulatedDim threadIdx;
inline thread_local EmulatedDim blockIdx;
inline thread_local EmulatedDim blockDim;

namespace sbp_fast::emulation {

inline constexpr unsigned kWarp = 32;

// What the threads of the block that runs share.
struct Block {
  explicit Block(unsigned threads) : all(threads), exchange(threads) {
    for (unsigned warp = 0; warp < threads / kWarp; ++warp) {
      warps.push_back(std::make_unique<std::barrier<>>(kWarp));
    }
  }

  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> exchange;  // one slot per thread, for shuffles
  std::atomic<bool> any{false};
};

inline thread_local Block* block = nullptr;

// Runs kernel(arguments...) for every block of the grid, one after the other. `threads` must be a
// multiple of 32.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads,
            Arguments... arguments) {
  Block shared(threads);
  std::vector<std::thread> crew;
  crew.reserve(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    crew.emplace_back([=, &shared] {
      block = &shared;
      threadIdx.x = thread;
      blockDim.x = threads;
      for (int64_t index = 0; index < blocks; ++index) {
        blockIdx.x = static_cast<unsigned>(index);
        kernel(arguments...);
        // Shared memory is static here: nobody may begin the next block before all are done.
        shared.all.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : crew) thread.join();
}

}  // namespace sbp_fast::emulation

inline void __syncthreads() { sbp_fast::emulation::block->all.arrive_and_wait(); }

inline int __syncthreads_or(int mine) {
  auto* block = sbp_fast::emulation::block;
  if (mine) block->any = true;
  block->all.arrive_and_wait();
  const bool any = block->any;
  block->all.arrive_and_wait();
  if (threadIdx.x == 0) block->any = false;
  block->all.arrive_and_wait();
  return any;
}

template <typename T>
T __shfl_down_sync(unsigned, T mine, unsigned distance) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  using sbp_fast::emulation::kWarp;
  auto* block = sbp_fast::emulation::block;
  const unsigned thread = threadIdx.x;
  auto& warp = *block->warps[thread / kWarp];
  memcpy(&block->exchange[thread], &mine, sizeof(T));
  warp.arrive_and_wait();
  T theirs = mine;
  if (thread % kWarp + distance < kWarp) {
    memcpy(&theirs, &block->exchange[thread + distance], sizeof(T));
  }
  warp.arrive_and_wait();
  return theirs;
}
