// Philox in vectors, for counters that differ in their first word alone: the groups of one sample.
// Every 32-bit word lies in the lower half of a 64-bit lane, where the multiplier wants it; what
// the upper half holds does not matter until the end.
#pragma once

#include "../philox.h"
#include "vector.h"

namespace sbp_fast::cpu {
namespace {

inline constexpr int kPhiloxLanes = kVectorBytes / 8;
using PhiloxLanes = Vector<uint64_t, kPhiloxLanes>;

inline PhiloxLanes broadcast(uint64_t value) { return PhiloxLanes{} + value; }

// 64-bit products of the lower halves.
inline PhiloxLanes multiply(PhiloxLanes a, uint32_t b) {
#if defined(__AVX512F__)
  // With a mask of all lanes: about the plain one GCC 12 warns (PR 105593).
  return reinterpret_cast<PhiloxLanes>(_mm512_maskz_mul_epu32(
      0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(broadcast(b))));
#elif defined(__AVX2__)
  return reinterpret_cast<PhiloxLanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(broadcast(b))));
#elif defined(__SSE2__)
  return reinterpret_cast<PhiloxLanes>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(broadcast(b))));
#else
  return (a & 0xffffffffu) * b;
#endif
}

inline PhiloxLanes swap_halves(PhiloxLanes a) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return reinterpret_cast<PhiloxLanes>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(a), 0xb1));
#elif defined(__SSE2__) && !defined(__AVX512F__)
  return reinterpret_cast<PhiloxLanes>(_mm_shuffle_epi32(reinterpret_cast<__m128i>(a), 0xb1));
#else
  return (a >> 32) | (a << 32);  // which AVX-512 has as one instruction
#endif
}

// Within each 128 bits: the lower lane of `a`, then that of `b`; and the upper ones.
#if defined(__AVX512F__)
inline PhiloxLanes lower_lanes(PhiloxLanes a, PhiloxLanes b) {
  return __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14);
}
inline PhiloxLanes upper_lanes(PhiloxLanes a, PhiloxLanes b) {
  return __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
}
#elif defined(__AVX2__)
inline PhiloxLanes lower_lanes(PhiloxLanes a, PhiloxLanes b) {
  return __builtin_shufflevector(a, b, 0, 4, 2, 6);
}
inline PhiloxLanes upper_lanes(PhiloxLanes a, PhiloxLanes b) {
  return __builtin_shufflevector(a, b, 1, 5, 3, 7);
}
#else
inline PhiloxLanes lower_lanes(PhiloxLanes a, PhiloxLanes b) {
  return __builtin_shufflevector(a, b, 0, 2);
}
inline PhiloxLanes upper_lanes(PhiloxLanes a, PhiloxLanes b) {
  return __builtin_shufflevector(a, b, 1, 3);
}
#endif

// The function of a counter's first word that is left once the other words and the key are known.
// Of the first two rounds half is known beforehand, and part of the third.
class PhiloxOfFirstWord {
 public:
  explicit PhiloxOfFirstWord(PhiloxKey key) {
    for (int round = 0; round < kPhiloxRounds; ++round) {
      keys_[0][round] = broadcast(key.words[0]);
      keys_[1][round] = broadcast(key.words[1]);
      key.words[0] += kPhiloxKeyStep0;
      key.words[1] += kPhiloxKeyStep1;
    }
  }

  void set_other_words(uint32_t c1, uint32_t c2, uint32_t c3) {
    const PhiloxLanes first = broadcast(uint64_t{kPhiloxMultiplier1} * c2);
    first_2_ = keys_[1][0] ^ c3;
    const PhiloxLanes c0 = (first >> 32) ^ c1 ^ keys_[0][0];
    const PhiloxLanes second = multiply(c0, kPhiloxMultiplier0);
    second_0_ = first ^ keys_[0][1];
    second_2_ = (second >> 32) ^ keys_[1][1];
    third_2_ = second ^ keys_[1][2];
  }

  // Words 0 to 3 of each lane's block, in lower halves. Several vectors go side by side: each
  // product waits for the one before.
  template <int kVectors>
  void words(const PhiloxLanes (&first_words)[kVectors], PhiloxLanes (&result)[kVectors][4]) const {
    State states[kVectors];
    all_rounds_but_one(first_words, states);
    for (int v = 0; v < kVectors; ++v) {
      const State next = after_round(states[v], kPhiloxRounds - 1);
      result[v][0] = next.c0;
      result[v][1] = next.c1;
      result[v][2] = next.c2;
      result[v][3] = next.c3;
    }
  }

  // The same as pairs, one in each lane: words 0 and 1, words 2 and 3.
  template <int kVectors>
  void pairs(const PhiloxLanes (&first_words)[kVectors], PhiloxLanes (&result)[kVectors][2]) const {
    constexpr int kLast = kPhiloxRounds - 1;
    State states[kVectors];
    all_rounds_but_one(first_words, states);
    for (int v = 0; v < kVectors; ++v) {
      const State& state = states[v];
      // A product is two words of one pair, in the other order.
      result[v][0] = swap_halves(multiply(state.c2, kPhiloxMultiplier1)) ^
                     ((state.c1 ^ keys_[0][kLast]) & 0xffffffffu);
      result[v][1] = swap_halves(multiply(state.c0, kPhiloxMultiplier0)) ^
                     ((state.c3 ^ keys_[1][kLast]) & 0xffffffffu);
    }
  }

 private:
  struct State {
    PhiloxLanes c0, c1, c2, c3;
  };

  State after_round(const State& state, int round) const {
    const PhiloxLanes product0 = multiply(state.c0, kPhiloxMultiplier0);
    const PhiloxLanes product1 = multiply(state.c2, kPhiloxMultiplier1);
    return {(product1 >> 32) ^ (state.c1 ^ keys_[0][round]), product1,
            (product0 >> 32) ^ (state.c3 ^ keys_[1][round]), product0};
  }

  template <int kVectors>
  void all_rounds_but_one(const PhiloxLanes (&first_words)[kVectors],
                          State (&states)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      const PhiloxLanes product0 = multiply(first_words[v], kPhiloxMultiplier0);
      const PhiloxLanes product1 = multiply((product0 >> 32) ^ first_2_, kPhiloxMultiplier1);
      const PhiloxLanes c0 = (product1 >> 32) ^ second_0_;
      const PhiloxLanes c2 = product0 ^ second_2_;
      const PhiloxLanes third0 = multiply(c0, kPhiloxMultiplier0);
      const PhiloxLanes third1 = multiply(c2, kPhiloxMultiplier1);
      states[v] = {(third1 >> 32) ^ (product1 ^ keys_[0][2]), third1, (third0 >> 32) ^ third_2_,
                   third0};
    }
#pragma GCC unroll 8
    for (int round = 3; round < kPhiloxRounds - 1; ++round) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) states[v] = after_round(states[v], round);
    }
  }

  PhiloxLanes first_2_, second_0_, second_2_, third_2_;
  PhiloxLanes keys_[2][kPhiloxRounds];
};

}  // namespace
}  // namespace sbp_fast::cpu
