// Philox4x32-10, a random function rather than a generator: 128 bits of counter and 64 of key give
// 128 bits of noise, in any order and on any device the same.
//
// J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2,
// 3", SC 2011, section 3.3 and table 2.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace sbp_fast {

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
// What is added to the key's words from round to round.
inline constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u;
inline constexpr uint32_t kPhiloxKeyStep1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t words[2];
};

struct PhiloxBlock {
  uint32_t words[4];
};

SBP_FAST_HOST_DEVICE PhiloxBlock philox(PhiloxBlock counter, PhiloxKey key) {
  auto& [c0, c1, c2, c3] = counter.words;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * c0;
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key.words[0];
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key.words[1];
    c3 = static_cast<uint32_t>(product0);
    key.words[0] += kPhiloxKeyStep0;
    key.words[1] += kPhiloxKeyStep1;
  }
  return counter;
}

}  // namespace sbp_fast
