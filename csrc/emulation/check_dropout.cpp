// Philox against the published vectors, and the dropout kernels against the same computed one
// element at a time.
#include <algorithm>

#include "../cuda/dropout.cuh"
#include "check.h"

namespace sbp_fast::check {
namespace {

constexpr unsigned kThreads = 64;

const DropoutMask kMask{{{0x89abcdefu, 0x01234567u}}, 0xfffffffeu, 0x60000000u, 0xfffffffeu, 1.6};

// Random123 (the authors' own library), tests/kat_vectors, "philox4x32 10".
void check_known_answers() {
  struct KnownAnswer {
    PhiloxBlock counter;
    PhiloxKey key;
    PhiloxBlock expected;
  };
  const KnownAnswer answers[] = {
      {{{0, 0, 0, 0}}, {{0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
       {{0xffffffff, 0xffffffff}},
       {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {{0xa4093822, 0x299f31d0}},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}}};
  for (const KnownAnswer& answer : answers) {
    const PhiloxBlock actual = philox(answer.counter, answer.key);
    if (!std::equal(actual.words, actual.words + 4, answer.expected.words)) {
      fail("philox: counter %08x... gives %08x...", answer.counter.words[0], actual.words[0]);
    }
  }
}

template <typename T>
T expected_element(T value, int64_t sample, int64_t element) {
  const PhiloxBlock noise = dropout_noise(kMask, static_cast<uint64_t>(sample),
                                          static_cast<uint32_t>(element / kDropoutGroup));
  return dropout_element(value, noise.words[element % kDropoutGroup], kMask.threshold,
                         static_cast<DropoutWide<T>>(kMask.scale));
}

// The input may be the output: `offset` is that of both.
template <typename T, int kWidth>
void check_rows(int64_t outer, DropoutRows rows, int64_t offset, std::mt19937_64& random) {
  const std::string what = "dropout_rows " + std::string(typeid(T).name());
  const int64_t numel = outer * rows.samples * rows.inner;
  const Buffer<T> output(numel, offset, random);
  const Buffer<T> input(numel, offset, random);
  const Buffer<T> in_place(numel, offset, random);
  const int64_t blocks = (numel + cuda::kDropoutChunk - 1) / cuda::kDropoutChunk;
  const auto launch = [&](T* to, const T* from) {
    emulation::launch(cuda::dropout_rows<T, kWidth>, blocks, kThreads, to, from, numel, rows,
                      kMask);
  };
  launch(output.data(), input.data());
  launch(in_place.data(), in_place.data());
  for (int64_t at = 0; at < numel; ++at) {
    const int64_t row = at / rows.inner;
    const int64_t sample = row % rows.samples;
    const int64_t element = row / rows.samples * rows.inner + at % rows.inner;
    const auto expected = [&](double value) {
      return static_cast<double>(expected_element(static_cast<T>(value), sample, element));
    };
    check_close(what, at, output[at], expected(input[at]), 0.0);
    check_close(what + " in place", at, in_place[at], expected(in_place.before(at)), 0.0);
  }
  output.check_unchanged(what, [](int64_t i) { return i >= 0; });
  input.check_unchanged(what, [](int64_t) { return false; });
}

template <typename T, int kWidth>
void check_channels_last(int64_t samples, DropoutChannelsLast layout, int64_t offset,
                         std::mt19937_64& random) {
  const std::string what = "dropout_channels_last " + std::string(typeid(T).name());
  const int64_t numel = samples * layout.channels * layout.positions;
  const Buffer<T> output(numel, offset, random);
  const Buffer<T> input(numel, offset, random);
  const int64_t items = samples * layout.groups() * (layout.channels / kWidth);
  const int64_t items_of_block = cuda::kDropoutChunk / (kDropoutGroup * kWidth);
  emulation::launch(cuda::dropout_channels_last<T, kWidth>,
                    (items + items_of_block - 1) / items_of_block, kThreads, output.data(),
                    static_cast<const T*>(input.data()), samples, layout, kMask);
  for (int64_t at = 0; at < numel; ++at) {
    const int64_t channel = at % layout.channels;
    const int64_t position = at / layout.channels % layout.positions;
    const int64_t sample = at / layout.channels / layout.positions;
    const T expected =
        expected_element(static_cast<T>(input[at]), sample, channel * layout.positions + position);
    check_close(what, at, output[at], static_cast<double>(expected), 0.0);
  }
  output.check_unchanged(what, [](int64_t i) { return i >= 0; });
}

template <typename T>
void check_type(std::mt19937_64& random) {
  constexpr int kWidth = cuda::kVectorBytes / static_cast<int>(sizeof(T));
  check_rows<T, kWidth>(1, {3, 4}, 0, random);
  check_rows<T, kWidth>(5, {3, 12}, 0, random);
  check_rows<T, kWidth>(1, {2, 5000}, 0, random);
  check_rows<T, kWidth>(1, {1, 20004}, 0, random);
  check_rows<T, 1>(1, {7, 1}, 0, random);
  check_rows<T, 1>(3, {5, 7}, 1, random);
  check_rows<T, 1>(1, {1, 9001}, 3, random);
  constexpr int kChannels = kWidth < 4 ? kWidth : 4;
  check_channels_last<T, kChannels>(2, {4, 4}, 0, random);
  check_channels_last<T, kChannels>(3, {20, 64}, 0, random);
  check_channels_last<T, kChannels>(1, {600, 16}, 0, random);
  check_channels_last<T, 1>(2, {3, 49}, 1, random);
  check_channels_last<T, 1>(2, {5, 2}, 0, random);
  check_channels_last<T, 1>(1, {37, 60}, 0, random);
}

void check_far_elements() {
  constexpr int64_t kHuge = (int64_t{1} << 31) + 9;
  const DropoutRows rows{3, kHuge};
  const cuda::DropoutPlace place = cuda::place_in_rows(rows, 4 * kHuge + 5);
  if (place.sample != 1 || place.element != kHuge + 5) fail("place_in_rows: wrong beyond 2^31");
  constexpr int64_t kLast = (int64_t{kDropoutGroup} << 32) - kDropoutGroup - 1;
  const PhiloxBlock noise = cuda::noise_from(kMask, 1, kLast);
  const PhiloxBlock first = dropout_noise(kMask, 1, 0xfffffffeu);
  const PhiloxBlock second = dropout_noise(kMask, 1, 0xffffffffu);
  if (noise.words[0] != first.words[3] ||
      !std::equal(second.words, second.words + 3, noise.words + 1)) {
    fail("noise_from: wrong at the last elements");
  }
}

}  // namespace
}  // namespace sbp_fast::check

int main() {
  using namespace sbp_fast::check;
  std::mt19937_64 random(4);
  check_known_answers();
  check_type<float>(random);
  check_type<double>(random);
  check_type<sbp_fast::BFloat16>(random);
  check_type<sbp_fast::Half>(random);
  check_far_elements();
}
