// Vectors of one compiled width, through the compiler's own vector types: the same source serves
// every instruction set, and the flags of the file that includes this decide what it becomes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../arithmetic.h"

namespace sbp_fast::cpu {
namespace {  // each including file has its own copy, compiled for its own instruction set

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <typename T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

template <typename V>
inline V load(const void* address) {
  V value;
  std::memcpy(&value, address, sizeof(V));
  return value;
}

template <typename V>
inline void store(void* address, V value) {
  std::memcpy(address, &value, sizeof(V));
}

// `address` must be a multiple of the vector's size.
template <typename V>
inline void store_streaming(void* address, V value) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(address), reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(address), reinterpret_cast<__m256i>(value));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(address), reinterpret_cast<__m128i>(value));
#else
  store(address, value);
#endif
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for the memory that a walk will reach in kPrefetchBytes. The processor's own prefetchers
// stop at every page, and arithmetic between the loads leaves it too few of them in flight to hide
// that.
inline constexpr int kPrefetchBytes = 1024;

inline constexpr int kCacheLineBytes = 64;

// Every line of the kBytes from `address` on.
template <bool kForWriting, int kBytes>
inline void prefetch_ahead(const void* address) {
  for (int line = 0; line < kBytes; line += kCacheLineBytes) {
    __builtin_prefetch(static_cast<const char*>(address) + kPrefetchBytes + line, kForWriting);
  }
}

// Widening loads: kLanes elements of storage type S as T.
template <typename T, int kLanes, typename S>
inline Vector<T, kLanes> load_as(const S* address) {
  return __builtin_convertvector(load<Vector<S, kLanes>>(address), Vector<T, kLanes>);
}

// GCC takes __builtin_convertvector between widths apart into quarters; where that would be felt,
// the instruction is named.
template <typename T, int kLanes>
inline Vector<T, kLanes> load_as(const BFloat16* address) {
  using Bits = Vector<uint32_t, kLanes>;
  Bits bits;
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    bits = reinterpret_cast<Bits>(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address))));
  } else
#endif
#if defined(__AVX2__)
      if constexpr (kLanes == 8) {
    bits = reinterpret_cast<Bits>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(address))));
  } else
#endif
  {
    bits = __builtin_convertvector(load<Vector<uint16_t, kLanes>>(address), Bits);
  }
  return __builtin_convertvector(reinterpret_cast<Vector<float, kLanes>>(bits << 16),
                                 Vector<T, kLanes>);
}

template <typename T, int kLanes>
inline Vector<T, kLanes> load_as(const Half* address) {
  Vector<float, kLanes> wide;
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    wide = reinterpret_cast<Vector<float, kLanes>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address))));
  } else
#endif
#if defined(__F16C__)
      if constexpr (kLanes == 8) {
    wide = reinterpret_cast<Vector<float, kLanes>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(address))));
  } else if constexpr (kLanes == 4) {
    wide = reinterpret_cast<Vector<float, kLanes>>(
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(address))));
  } else
#endif
  {
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = static_cast<float>(address[lane]);
  }
  return __builtin_convertvector(wide, Vector<T, kLanes>);
}

template <int kLanes>
inline void store_bfloat16(BFloat16* address, Vector<float, kLanes> value) {
  using Bits = Vector<uint32_t, kLanes>;
  const auto bits = reinterpret_cast<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding up a NaN's payload could end in infinity: a NaN becomes the quiet one instead.
  const Bits is_nan = reinterpret_cast<Bits>((bits & 0x7fffffffu) > 0x7f800000u);
  const Bits result = (is_nan & 0x7fc0u) | (~is_nan & rounded);
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(address),
                        _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(result)));
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const auto words = reinterpret_cast<__m256i>(result);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(address), _mm256_castsi256_si128(packed));
    return;
  }
#endif
  store(address, __builtin_convertvector(result, Vector<uint16_t, kLanes>));
}

template <int kLanes>
inline void store_half(Half* address, Vector<float, kLanes> value) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(address),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(value),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (kLanes == 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(address),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(value),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
#endif
  for (int lane = 0; lane < kLanes; ++lane) address[lane] = static_cast<Half>(value[lane]);
}

// Narrowing stores, rounded to nearest even.
template <int kLanes, typename T, typename S>
inline void store_as(S* address, Vector<T, kLanes> value) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    store_bfloat16<kLanes>(address, __builtin_convertvector(value, Vector<float, kLanes>));
  } else if constexpr (std::is_same_v<S, Half>) {
    store_half<kLanes>(address, __builtin_convertvector(value, Vector<float, kLanes>));
  } else {
    store(address, __builtin_convertvector(value, Vector<S, kLanes>));
  }
}

// The two halves of a full vector of floats, as doubles.
inline constexpr int kDoubleLanes = kVectorBytes / 8;
using Doubles = Vector<double, kDoubleLanes>;
using Floats = Vector<float, 2 * kDoubleLanes>;

inline Doubles low_half(Floats value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(
      _mm512_cvtps_pd(_mm512_castps512_ps256(reinterpret_cast<__m512>(value))));
#elif defined(__AVX2__)
  return reinterpret_cast<Doubles>(
      _mm256_cvtps_pd(_mm256_castps256_ps128(reinterpret_cast<__m256>(value))));
#else
  return Doubles{value[0], value[1]};
#endif
}

inline Doubles high_half(Floats value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Doubles>(
      _mm512_cvtps_pd(_mm512_extractf32x8_ps(reinterpret_cast<__m512>(value), 1)));
#elif defined(__AVX2__)
  return reinterpret_cast<Doubles>(
      _mm256_cvtps_pd(_mm256_extractf128_ps(reinterpret_cast<__m256>(value), 1)));
#else
  return Doubles{value[2], value[3]};
#endif
}

// Sum of squares in double, whatever the lanes' type. Float lanes fill two vectors of doubles.
struct SumOfSquares {
  Doubles low = {};
  Doubles high = {};

  inline void add(Floats value) {
    const Doubles first = low_half(value);
    const Doubles second = high_half(value);
    low += first * first;
    high += second * second;
  }

  inline void add(Doubles value) { low += value * value; }

  // As many doubles in memory as there are float lanes, which would round them.
  inline void add_exact(const double* address) {
    add(load<Doubles>(address));
    const auto second = load<Doubles>(address + kDoubleLanes);
    high += second * second;
  }

  inline double total() const {
    const Doubles both = low + high;
    double sum = 0.0;
    for (int lane = 0; lane < kDoubleLanes; ++lane) sum += both[lane];
    return sum;
  }
};

// Remembers whether any lane was non-finite. Exponent bits all set is a maximum of the masked bits.
template <typename T, int kLanes>
struct NonFinite {
  using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  static constexpr Word kExponent =
      sizeof(T) == 4 ? Word(0x7f800000) : static_cast<Word>(0x7ff0000000000000ll);
  Vector<Word, kLanes> seen = {};

  inline void add(Vector<T, kLanes> value) {
    seen |= (reinterpret_cast<Vector<Word, kLanes>>(value) & kExponent) == kExponent;
  }

  inline bool any() const {
    Word joined = 0;
    for (int lane = 0; lane < kLanes; ++lane) joined |= seen[lane];
    return joined != 0;
  }
};

}  // namespace
}  // namespace sbp_fast::cpu
