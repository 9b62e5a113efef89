// The dropout kernels. Included once per instruction set.
#pragma once

#include <algorithm>

#include "dropout_kernels.h"
#include "philox_vector.h"

namespace sbp_fast::cpu {
namespace {

// Elements whose noise lies in one vector, and those of all words of a vector of blocks.
inline constexpr int kNoiseLanes = 2 * kPhiloxLanes;
inline constexpr int kBlocksElements = kDropoutGroup * kPhiloxLanes;
using Noise = Vector<uint32_t, kNoiseLanes>;

// Vectors of blocks that are computed side by side.
inline constexpr int kInFlight = 4;

// The product of a bfloat16 with a finite factor. Its NaNs are a bfloat16's or the processor's own:
// their lower bits are zero, and rounding carries nothing into the others. So no NaN needs care.
inline void store_product(BFloat16* address, Vector<float, kNoiseLanes> value) {
  const auto bits = reinterpret_cast<Noise>(value);
  const Noise rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
#if defined(__AVX2__) && !defined(__AVX512F__)
  const auto words = reinterpret_cast<__m256i>(rounded);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(address), _mm256_castsi256_si128(packed));
#else
  store(address, __builtin_convertvector(rounded, Vector<uint16_t, kNoiseLanes>));
#endif
}

template <typename T, typename V>
inline void store_product(T* address, V value) {
  store_as<kNoiseLanes, DropoutWide<T>>(address, value);
}

template <typename T>
struct Factor {
  explicit Factor(const DropoutMask& mask)
      : threshold(Noise{} + mask.threshold),
        scale(Vector<DropoutWide<T>, kNoiseLanes>{} + static_cast<DropoutWide<T>>(mask.scale)) {}

  // Elements side by side, as dropout_element has it.
  void apply(T* output, const T* input, Noise noise) const {
    using wide_t = DropoutWide<T>;
    using Bits = std::conditional_t<sizeof(wide_t) == 4, uint32_t, uint64_t>;
    const auto keep = reinterpret_cast<Vector<int32_t, kNoiseLanes>>(noise >= threshold);
    const auto factor = reinterpret_cast<Vector<wide_t, kNoiseLanes>>(
        reinterpret_cast<Vector<Bits, kNoiseLanes>>(scale) &
        __builtin_convertvector(keep, Vector<Bits, kNoiseLanes>));
    store_product(output, load_as<wide_t, kNoiseLanes>(input) * factor);
  }

  Noise threshold;
  Vector<DropoutWide<T>, kNoiseLanes> scale;
};

inline void set_sample(PhiloxOfFirstWord& philox, const DropoutMask& mask, int64_t sample) {
  const uint64_t index = mask.first_sample + static_cast<uint64_t>(sample);
  philox.set_other_words(mask.call, static_cast<uint32_t>(index),
                         static_cast<uint32_t>(index >> 32));
}

// Which block a lane computes, so that interleaved pairs are elements in their order: within each
// 128 bits, one of the first half of the blocks and one of the second.
inline PhiloxLanes blocks_from(int64_t group) {
  PhiloxLanes blocks = broadcast(static_cast<uint64_t>(group));
  for (int lane = 0; lane < kPhiloxLanes; ++lane) {
    blocks[lane] += lane / 2 + (lane % 2) * (kPhiloxLanes / 2);
  }
  return blocks;
}

// The noise of kVectors * kBlocksElements elements, in their order.
template <int kVectors>
inline void noise_of(const PhiloxOfFirstWord& philox, PhiloxLanes blocks,
                     Noise (&noise)[2 * kVectors]) {
  PhiloxLanes first_words[kVectors];
  PhiloxLanes pairs[kVectors][2];
  for (int v = 0; v < kVectors; ++v)
    first_words[v] = blocks + static_cast<uint64_t>(v * kPhiloxLanes);
  philox.pairs(first_words, pairs);
  for (int v = 0; v < kVectors; ++v) {
    noise[2 * v] = reinterpret_cast<Noise>(lower_lanes(pairs[v][0], pairs[v][1]));
    noise[2 * v + 1] = reinterpret_cast<Noise>(upper_lanes(pairs[v][0], pairs[v][1]));
  }
}

// Fewer elements than a vector of blocks has, the first of which need not begin a block.
template <typename T>
void drop_few(T* output, const T* input, int64_t count, int64_t element,
              const PhiloxOfFirstWord& philox, const DropoutMask& mask) {
  Noise noise[2];
  noise_of<1>(philox, blocks_from(element / kDropoutGroup), noise);
  uint32_t words[kBlocksElements];
  std::memcpy(words, noise, sizeof(words));
  for (int64_t i = 0; i < count; ++i) {
    output[i] = dropout_element(input[i], words[element % kDropoutGroup + i], mask.threshold,
                                static_cast<DropoutWide<T>>(mask.scale));
  }
}

// `count` elements side by side, the first of which is `element` of its sample.
template <typename T>
void drop_run(T* output, const T* input, int64_t count, int64_t element,
              const PhiloxOfFirstWord& philox, const DropoutMask& mask, const Factor<T>& factor) {
  int64_t i = 0;
  if (element % kDropoutGroup != 0) {
    i = std::min(count, kBlocksElements - element % kDropoutGroup);
    drop_few(output, input, i, element, philox, mask);
  }
  PhiloxLanes blocks = blocks_from((element + i) / kDropoutGroup);
  const auto step = [&]<int kVectors>() {
    Noise noise[2 * kVectors];
    noise_of<kVectors>(philox, blocks, noise);
    for (int k = 0; k < 2 * kVectors; ++k) {
      factor.apply(output + i + k * kNoiseLanes, input + i + k * kNoiseLanes, noise[k]);
    }
    blocks += static_cast<uint64_t>(kVectors * kPhiloxLanes);
    i += kVectors * kBlocksElements;
  };
  while (i + kInFlight * kBlocksElements <= count) step.template operator()<kInFlight>();
  while (i + kBlocksElements <= count) step.template operator()<1>();
  if (i < count) drop_few(output + i, input + i, count - i, element + i, philox, mask);
}

template <typename T>
void drop_rows(void* output_data, const void* input_data, int64_t begin, int64_t end,
               const DropoutRows& rows, const DropoutMask& mask) {
  auto* output = static_cast<T*>(output_data);
  const auto* input = static_cast<const T*>(input_data);
  const Factor<T> factor(mask);
  PhiloxOfFirstWord philox(mask.key);
  int64_t row = begin / rows.inner;
  int64_t offset = begin % rows.inner;
  while (begin < end) {
    const int64_t count = std::min(rows.inner - offset, end - begin);
    set_sample(philox, mask, row % rows.samples);
    drop_run(output + begin, input + begin, count, row / rows.samples * rows.inner + offset, philox,
             mask, factor);
    begin += count;
    ++row;
    offset = 0;
  }
}

// The noise of four elements, the first of which is given, in each lane.
template <bool kAligned, int kVectors>
inline void noise_of_channels(const PhiloxOfFirstWord& philox, const PhiloxLanes (&first)[kVectors],
                              PhiloxLanes (&noise)[kVectors][kDropoutGroup]) {
  PhiloxLanes blocks[kVectors];
  for (int v = 0; v < kVectors; ++v) blocks[v] = first[v] / kDropoutGroup;
  philox.words(blocks, noise);
  if constexpr (!kAligned) {
    // They lie in two blocks, and begin at another word in every lane.
    PhiloxLanes next[kVectors][kDropoutGroup];
    for (int v = 0; v < kVectors; ++v) blocks[v] += 1u;
    philox.words(blocks, next);
    for (int v = 0; v < kVectors; ++v) {
      const PhiloxLanes one = -(first[v] & 1u);
      const PhiloxLanes two = -((first[v] >> 1) & 1u);
      PhiloxLanes words[2 * kDropoutGroup];
      for (int i = 0; i < kDropoutGroup; ++i) {
        words[i] = noise[v][i];
        words[kDropoutGroup + i] = next[v][i];
      }
      for (int i = 0; i < 6; ++i) words[i] = (words[i + 1] & one) | (words[i] & ~one);
      for (int i = 0; i < 4; ++i) noise[v][i] = (words[i + 2] & two) | (words[i] & ~two);
    }
  }
}

// One group of positions with all its channels, `element` being the first of channel 0. Lanes hold
// channels: the even ones of a vector of noise in one vector of blocks, the odd ones in another.
template <bool kAligned, typename T>
void drop_group(T* output, const T* input, const DropoutChannelsLast& layout, int64_t positions,
                int64_t element, const PhiloxOfFirstWord& philox, const DropoutMask& mask,
                const Factor<T>& factor) {
  const auto stride = static_cast<uint64_t>(layout.positions);
  PhiloxLanes first = broadcast(static_cast<uint64_t>(element));
  for (int lane = 0; lane < kPhiloxLanes; ++lane) first[lane] += 2 * lane * stride;
  int64_t channel = 0;
  const auto step = [&]<int kVectors>(int64_t count) {
    constexpr int kPairs = kVectors / 2;
    PhiloxLanes firsts[kVectors];
    PhiloxLanes words[kVectors][kDropoutGroup];
    for (int v = 0; v < kVectors; ++v) {
      firsts[v] = first + static_cast<uint64_t>(v / 2 * kNoiseLanes + v % 2) * stride;
    }
    noise_of_channels<kAligned>(philox, firsts, words);
    for (int i = 0; i < kDropoutGroup && i < positions; ++i) {
      for (int k = 0; k < kPairs; ++k) {
        const auto noise =
            reinterpret_cast<Noise>((words[2 * k][i] & 0xffffffffu) | (words[2 * k + 1][i] << 32));
        const int64_t at = i * layout.channels + channel + k * kNoiseLanes;
        if (count >= kPairs * kNoiseLanes) {
          factor.apply(output + at, input + at, noise);
        } else {
          for (int64_t lane = 0; lane < count; ++lane) {
            output[at + lane] = dropout_element(input[at + lane], noise[lane], mask.threshold,
                                                static_cast<DropoutWide<T>>(mask.scale));
          }
        }
      }
    }
    first += static_cast<uint64_t>(kPairs * kNoiseLanes) * stride;
    channel += kPairs * kNoiseLanes;
  };
  constexpr int64_t kMany = kInFlight / 2 * kNoiseLanes;
  while (channel + kMany <= layout.channels) step.template operator()<kInFlight>(kMany);
  while (channel < layout.channels) step.template operator()<2>(layout.channels - channel);
}

template <typename T>
void drop_channels_last(void* output_data, const void* input_data, int64_t begin, int64_t end,
                        const DropoutChannelsLast& layout, const DropoutMask& mask) {
  const Factor<T> factor(mask);
  PhiloxOfFirstWord philox(mask.key);
  const int64_t groups = layout.groups();
  const bool aligned = layout.positions % kDropoutGroup == 0;
  for (int64_t group = begin; group < end; ++group) {
    const int64_t sample = group / groups;
    const int64_t position = group % groups * kDropoutGroup;
    const int64_t at = (sample * layout.positions + position) * layout.channels;
    set_sample(philox, mask, sample);
    (aligned ? drop_group<true, T> : drop_group<false, T>)(static_cast<T*>(output_data) + at,
                                                           static_cast<const T*>(input_data) + at,
                                                           layout, layout.positions - position,
                                                           position, philox, mask, factor);
  }
}

#define SBP_FAST_DROPOUT_TABLE(name)                                                       \
  {                                                                                        \
    name, {drop_rows<float>, drop_rows<double>, drop_rows<BFloat16>, drop_rows<Half>}, {   \
      drop_channels_last<float>, drop_channels_last<double>, drop_channels_last<BFloat16>, \
          drop_channels_last<Half>                                                         \
    }                                                                                      \
  }

}  // namespace
}  // namespace sbp_fast::cpu
