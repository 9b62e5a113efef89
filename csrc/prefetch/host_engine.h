// The engine where there is no device: copies between two places of host memory, on streams of the
// host's.
#pragma once

#include <array>
#include <cstring>

#include "host_streams.h"
#include "ring.h"

namespace sbp_fast::prefetch {

class HostEngine : public Engine {
 public:
  explicit HostEngine(HostStreams::Stream slow) : streams_(slow) {}

  void mark_consumed(int slot, Main) override {
    streams_.mark(HostStreams::kMain, consumed_[slot]);
  }
  void wait_for_consumed(int slot) override { streams_.wait(HostStreams::kSide, consumed_[slot]); }
  void copy(void* device, const void* host, int64_t bytes) override {
    streams_.run(HostStreams::kSide,
                 [=] { std::memcpy(device, host, static_cast<size_t>(bytes)); });
  }
  void mark_copied(int slot) override { streams_.mark(HostStreams::kSide, copied_[slot]); }
  void wait_for_copied(int slot, Main) override {
    streams_.wait(HostStreams::kMain, copied_[slot]);
  }
  void wait_on_host(int slot) override { streams_.wait_on_host(copied_[slot]); }

  HostStreams& streams() { return streams_; }

 private:
  HostStreams streams_;
  std::array<HostStreams::Event, Ring::kSlots> consumed_, copied_;
};

}  // namespace sbp_fast::prefetch
