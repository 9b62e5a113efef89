// The ring under the sanitizers: the three orders with a stream that is late, many micro-batches of
// many sizes, errors, and rings that end in the middle of their work.
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "../host_engine.h"

using namespace sbp_fast::prefetch;

namespace {

void expect(bool holds, const char* what, int64_t number) {
  if (holds) return;
  std::fprintf(stderr, "%s: micro-batch %lld\n", what, static_cast<long long>(number));
  std::exit(1);
}

// 97 rows of five numbers, each its own, in memory that ends where the last one ends.
constexpr int64_t kLength = 97, kColumns = 5;

std::vector<int64_t> make_source() {
  std::vector<int64_t> source(kLength * kColumns);
  std::iota(source.begin(), source.end(), 1000);
  return source;
}

struct MicroBatch {
  std::vector<int64_t> index;
  std::vector<int64_t> gathered, device, result;
};

MicroBatch make_micro_batch(int64_t number) {
  MicroBatch made;
  for (int64_t i = 0; i < 1 + number % 7; ++i)
    made.index.push_back((number * 31 + i * 17) % kLength);
  for (auto* memory : {&made.gathered, &made.device, &made.result}) {
    memory->resize(made.index.size() * kColumns);
  }
  return made;
}

Piece piece_of(const std::vector<int64_t>& source, const MicroBatch& micro_batch) {
  Piece piece;
  piece.rows.first = reinterpret_cast<const char*>(source.data());
  piece.rows.length = kLength;
  piece.rows.stride = piece.rows.run = kColumns * static_cast<int64_t>(sizeof(int64_t));
  piece.rows.index = micro_batch.index.data();
  piece.rows.count = static_cast<int64_t>(micro_batch.index.size());
  return piece;
}

char* bytes(std::vector<int64_t>& memory) { return reinterpret_cast<char*>(memory.data()); }

void expect_rows(const std::vector<int64_t>& values, const MicroBatch& micro_batch,
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
void check_orders(HostEngine::Stream slow) {
  const std::vector<int64_t> source = make_source();
  auto engine = std::make_shared<HostEngine>(slow);
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
      engine->read(all[number].result.data(), device[number % Ring::kSlots].data(),
                   static_cast<int64_t>(all[number].result.size() * sizeof(int64_t)));
      // Everything is on its way before the slow stream has done anything.
      ring.finish_reading();
    }
    ring.join(0);
  }
  engine->synchronize();
  for (size_t number = 0; number < all.size(); ++number) {
    expect_rows(all[number].result, all[number], static_cast<int64_t>(number));
  }
}

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
                      std::shared_ptr<Engine>(std::make_shared<HostEngine>(HostEngine::kSide))}) {
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
    if (number % 2 == 0) engine = std::make_shared<HostEngine>(HostEngine::kSide);
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
    if (engine != nullptr) engine->synchronize();
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
  check_orders(HostEngine::kSide);
  check_orders(HostEngine::kMain);
  check_many();
  check_errors();
  check_ends();
}
