// Two streams without a device: the order of copies and computations, made deterministic.
//
// One stream is eager and runs whatever it may as soon as it may; the other is slow and runs
// nothing before somebody on the host waits for it. Whoever forgets to wait for the slow stream
// computes with what was there before, every time.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <utility>

namespace sbp_fast::prefetch {

class HostStreams {
 public:
  enum Stream { kMain, kSide, kStreams };

  // How often it was marked, and how often the stream has come to the mark.
  struct Event {
    int64_t marked = 0;
    int64_t reached = 0;
  };

  explicit HostStreams(Stream slow) : slow_(slow) {}

  void run(Stream stream, std::function<void()> function) {
    std::lock_guard lock(mutex_);
    enqueue(stream, {[] { return true; }, std::move(function)});
  }

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

  // The host waits; not at all where there was no mark.
  void wait_on_host(const Event& event) {
    std::lock_guard lock(mutex_);
    if (event.reached < event.marked) play(kStreams);
  }

  // The host waits for all streams.
  void synchronize() {
    std::lock_guard lock(mutex_);
    play(kStreams);
  }

 private:
  struct Operation {
    std::function<bool()> may_run;
    std::function<void()> run;
  };

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
};

}  // namespace sbp_fast::prefetch
