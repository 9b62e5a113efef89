// The CUDA engine's own source on the host: it keeps the three orders.
#include "../cuda_engine.cu"
#include "orders.h"

using namespace sbp_fast::prefetch;

int main() {
  for (const auto slow : {HostStreams::kSide, HostStreams::kMain}) {
    HostStreams streams(slow);
    host_streams = &streams;
    check_orders(std::shared_ptr<Engine>(sbp_fast_copy_engine(0)), streams);
  }
  bool refused = false;
  try {
    sbp_fast_copy_engine(7);
  } catch (const std::runtime_error& error) {
    refused =
        std::string(error.what()) == "prefetching: cudaSetDevice failed: invalid device ordinal";
  }
  expect(refused, "an error of CUDA's is lost", 7);
}
