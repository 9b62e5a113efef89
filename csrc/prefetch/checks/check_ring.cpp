// The ring under the sanitizers: the three orders with a stream that is late, many micro-batches of
// many sizes, errors, and rings that end in the middle of their work.
#include "../host_engine.h"
#include "orders.h"

using namespace sbp_fast::prefetch;

namespace {

void check_many() {
  const std::vector<int64_t> source = make_source();
  MicroBatch coming = make_micro_batch(0);
  Ring ring(nullptr);
  const auto submit = [&](int64_t number) {
    coming = make_micro_batch(number);
    Piece piece = piece_of(source, coming);
    piece.gathered = bytes(coming.gathered);
    return ring.submit({piece}, 0);
  };
  int64_t following = submit(0);
  constexpr int64_t kMany = 10000;
  for (int64_t number = 0; number < kMany; ++number) {
    const int64_t ticket = following;
    const MicroBatch micro_batch = std::move(coming);
    if (number + 1 < kMany) following = submit(number + 1);
    ring.receive(ticket, 0);
    expect_rows(micro_batch.gathered, micro_batch, number);
  }
}

void check_errors() {
  const std::vector<int64_t> source = make_source();
  for (auto engine : {std::shared_ptr<Engine>(),
                      std::shared_ptr<Engine>(std::make_shared<HostEngine>(HostStreams::kSide))}) {
    MicroBatch bad = make_micro_batch(6);
    Ring ring(engine);
    for (int64_t row : {int64_t{-1}, kLength}) {
      bad.index[3] = row;
      Piece piece = piece_of(source, bad);
      piece.gathered = bytes(bad.gathered);
      piece.device = bytes(bad.device);
      const int64_t ticket = ring.submit({piece}, 0);
      bool caught = false;
      try {
        ring.receive(ticket, 0);
      } catch (const std::out_of_range&) {
        caught = true;
      }
      expect(caught, "no error for a row outside of the source", row);
    }
    // One that nobody receives is forgotten.
    Piece piece = piece_of(source, bad);
    piece.gathered = bytes(bad.gathered);
    piece.device = bytes(bad.device);
    ring.submit({piece}, 0);
    ring.join(0);
    bad.index[3] = 5;
    const int64_t ticket = ring.submit({piece}, 0);
    ring.receive(ticket, 0);
    expect_rows(bad.gathered, bad, ticket);
  }
}

void check_ends() {
  const std::vector<int64_t> source = make_source();
  for (int64_t number = 0; number < 300; ++number) {
    std::shared_ptr<HostEngine> engine;
    if (number % 2 == 0) engine = std::make_shared<HostEngine>(HostStreams::kSide);
    {
      std::array<MicroBatch, 2> micro_batches{make_micro_batch(number),
                                              make_micro_batch(number + 1)};
      Ring ring(engine);
      for (MicroBatch& micro_batch : micro_batches) {
        Piece piece = piece_of(source, micro_batch);
        piece.gathered = bytes(micro_batch.gathered);
        piece.device = bytes(micro_batch.device);
        ring.submit({piece}, 0);
      }
      if (number % 4 == 0) ring.finish_reading();
    }
    // A copy that is late finds no memory any more.
    if (engine != nullptr) engine->streams().synchronize();
  }
}

// Two of three columns, and of those every other one backwards, out of rows of 4 x 5 numbers.
void check_strides() {
  std::vector<int64_t> source(6 * 4 * 5);
  std::iota(source.begin(), source.end(), 0);
  Rows rows;
  constexpr int64_t kItem = sizeof(int64_t);
  rows.first = reinterpret_cast<const char*>(source.data() + 4);
  rows.length = 6;
  rows.stride = 20 * kItem;
  rows.count = 6;
  rows.inner = {{2, 10 * kItem}, {3, -2 * kItem}};
  rows.run = kItem;
  std::vector<int64_t> gathered(6 * 2 * 3);
  gather(reinterpret_cast<char*>(gathered.data()), rows);
  size_t position = 0;
  for (int64_t row = 0; row < 6; ++row) {
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t j = 0; j < 3; ++j) {
        expect(gathered[position++] == row * 20 + 4 + i * 10 - j * 2, "strided rows", row);
      }
    }
  }
}

}  // namespace

int main() {
  check_strides();
  for (const auto slow : {HostStreams::kSide, HostStreams::kMain}) {
    const auto engine = std::make_shared<HostEngine>(slow);
    check_orders(engine, engine->streams());
  }
  check_many();
  check_errors();
  check_ends();
}
