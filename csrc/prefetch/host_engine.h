// Two streams without a device: the order of copies and computations, made deterministic.
//
// One stream is eager and runs whatever it may as soon as it may; the other is slow and runs
// nothing before somebody on the host waits for it. Whoever forgets to wait for the slow stream
// computes with what was there before, every time.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

#include "ring.h"

namespace sbp_fast::prefetch {

class HostEngine : public Engine {
 public:
  enum Stream { kMain, kSide, kStreams };

  explicit HostEngine(Stream slow) : slow_(slow) {}

  void mark_consumed(int slot, Main) override { mark(kMain, consumed_[slot]); }
  void wait_for_consumed(int slot) override { wait(kSide, consumed_[slot]); }
  void copy(void* device, const void* host, int64_t bytes) override {
    run(kSide, [=] { std::memcpy(device, host, static_cast<size_t>(bytes)); });
  }
  void mark_copied(int slot) override { mark(kSide, copied_[slot]); }
  void wait_for_copied(int slot, Main) override { wait(kMain, copied_[slot]); }
  void wait_on_host(int slot) override {
    std::lock_guard lock(mutex_);
    if (is_due(copied_[slot])) play(kStreams);
  }

  // Computes: reads device memory when the main stream's turn comes.
  void read(void* result, const void* device, int64_t bytes) {
    run(kMain, [=] { std::memcpy(result, device, static_cast<size_t>(bytes)); });
  }

  // Waits on the host for both streams.
  void synchronize() {
    std::lock_guard lock(mutex_);
    play(kStreams);
  }

 private:
  // How often it was marked, and how often the stream has come to the mark.
  struct Event {
    int64_t marked = 0;
    int64_t reached = 0;
  };

  struct Operation {
    std::function<bool()> may_run;
    std::function<void()> run;
  };

  static bool is_due(const Event& event) { return event.reached < event.marked; }

  void mark(Stream stream, Event& event) {
    std::lock_guard lock(mutex_);
    const int64_t mark = ++event.marked;
    enqueue(stream, {[] { return true; }, [&event, mark] { event.reached = mark; }});
  }

  // As CUDA does: for the mark that is the last one now.
  void wait(Stream stream, const Event& event) {
    std::lock_guard lock(mutex_);
    const int64_t mark = event.marked;
    enqueue(stream, {[&event, mark] { return event.reached >= mark; }, [] {}});
  }

  void run(Stream stream, std::function<void()> function) {
    std::lock_guard lock(mutex_);
    enqueue(stream, {[] { return true; }, std::move(function)});
  }

  void enqueue(Stream stream, Operation operation) {
    queues_[stream].push_back(std::move(operation));
    play(slow_);
  }

  // Runs all that may run, of all streams but one.
  void play(Stream left_out) {
    bool went_on = true;
    while (went_on) {
      went_on = false;
      for (int stream = 0; stream < kStreams; ++stream) {
        std::deque<Operation>& queue = queues_[stream];
        while (stream != left_out && !queue.empty() && queue.front().may_run()) {
          queue.front().run();
          queue.pop_front();
          went_on = true;
        }
      }
    }
  }

  const Stream slow_;
  std::mutex mutex_;
  std::array<std::deque<Operation>, kStreams> queues_;
  std::array<Event, Ring::kSlots> consumed_, copied_;
};

}  // namespace sbp_fast::prefetch
