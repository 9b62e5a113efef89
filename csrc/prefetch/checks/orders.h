// What the checks of the ring share: micro-batches that know their rows, and the three orders.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>

#include "../host_streams.h"
#include "../ring.h"

namespace sbp_fast::prefetch {

inline void expect(bool holds, const char* what, int64_t number) {
  if (holds) return;
  std::fprintf(stderr, "%s: micro-batch %lld\n", what, static_cast<long long>(number));
  std::exit(1);
}

// 97 rows of five numbers, each its own, in memory that ends where the last one ends.
constexpr int64_t kLength = 97, kColumns = 5;

inline std::vector<int64_t> make_source() {
  std::vector<int64_t> source(kLength * kColumns);
  std::iota(source.begin(), source.end(), 1000);
  return source;
}

struct MicroBatch {
  std::vector<int64_t> index;
  std::vector<int64_t> gathered, device, result;
};

inline MicroBatch make_micro_batch(int64_t number) {
  MicroBatch made;
  for (int64_t i = 0; i < 1 + number % 7; ++i)
    made.index.push_back((number * 31 + i * 17) % kLength);
  for (auto* memory : {&made.gathered, &made.device, &made.result}) {
    memory->resize(made.index.size() * kColumns);
  }
  return made;
}

inline Piece piece_of(const std::vector<int64_t>& source, const MicroBatch& micro_batch) {
  Piece piece;
  piece.rows.first = reinterpret_cast<const char*>(source.data());
  piece.rows.length = kLength;
  piece.rows.stride = piece.rows.run = kColumns * static_cast<int64_t>(sizeof(int64_t));
  piece.rows.index = micro_batch.index.data();
  piece.rows.count = static_cast<int64_t>(micro_batch.index.size());
  return piece;
}

inline char* bytes(std::vector<int64_t>& memory) { return reinterpret_cast<char*>(memory.data()); }

inline void expect_rows(const std::vector<int64_t>& values, const MicroBatch& micro_batch,
                        int64_t number) {
  for (size_t i = 0; i < micro_batch.index.size(); ++i) {
    for (int64_t j = 0; j < kColumns; ++j) {
      expect(values[i * kColumns + j] == 1000 + micro_batch.index[i] * kColumns + j,
             "rows of another micro-batch", number);
    }
  }
}

// Two slots of host and device memory for all micro-batches, which "compute" by reading their
// device memory.
inline void check_orders(const std::shared_ptr<Engine>& engine, HostStreams& streams) {
  const std::vector<int64_t> source = make_source();
  std::vector<MicroBatch> all;
  for (int64_t number = 0; number < 9; ++number) all.push_back(make_micro_batch(number));
  std::array<std::vector<int64_t>, Ring::kSlots> host, device;
  for (auto* memories : {&host, &device}) {
    for (auto& memory : *memories) memory.resize(7 * kColumns);
  }
  {
    Ring ring(engine);
    const auto submit = [&](size_t number) {
      Piece piece = piece_of(source, all[number]);
      piece.gathered = bytes(host[number % Ring::kSlots]);
      piece.device = bytes(device[number % Ring::kSlots]);
      return ring.submit({piece}, 0);
    };
    int64_t following = submit(0);
    for (size_t number = 0; number < all.size(); ++number) {
      const int64_t ticket = following;
      if (number + 1 < all.size()) following = submit(number + 1);
      ring.receive(ticket, 0);
      streams.run(HostStreams::kMain,
                  [&result = all[number].result, &from = device[number % Ring::kSlots]] {
                    std::copy_n(from.begin(), result.size(), result.begin());
                  });
      // Everything is on its way before the slow stream has done anything.
      ring.finish_reading();
    }
    ring.join(0);
  }
  streams.synchronize();
  for (size_t number = 0; number < all.size(); ++number) {
    expect_rows(all[number].result, all[number], static_cast<int64_t>(number));
  }
}

}  // namespace sbp_fast::prefetch
