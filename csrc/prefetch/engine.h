// What the ring asks of a device: copies on a side stream, and events that keep them in order.
//
// Implementations are called from the ring's thread and from the caller's at the same time, but
// never for the same slot. They throw what derives from std::exception.
#pragma once

#include <cstdint>

namespace sbp_fast::prefetch {

class Engine {
 public:
  // A stream of the caller's, on which micro-batches are computed.
  using Main = uintptr_t;

  virtual ~Engine() = default;

  // On the main stream: what is enqueued so far is all that used the slot's device memory.
  virtual void mark_consumed(int slot, Main main) = 0;
  // On the side stream: waits for that.
  virtual void wait_for_consumed(int slot) = 0;

  // On the side stream.
  virtual void copy(void* device, const void* host, int64_t bytes) = 0;

  // On the side stream: the slot's copies are all enqueued.
  virtual void mark_copied(int slot) = 0;
  // On the main stream: waits for the slot's copies.
  virtual void wait_for_copied(int slot, Main main) = 0;
  // On the host: the same. Returns at once where none were ever made.
  virtual void wait_on_host(int slot) = 0;
};

}  // namespace sbp_fast::prefetch
