// Shared by the checks: random values, buffers that end exactly where the allocation ends, and what
// to say when something is wrong.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../arithmetic.h"
#include "../cuda/plan.h"

namespace sbp_fast::check {

using torch::headeronly::ScalarType;

template <typename T>
inline constexpr ScalarType kDtype = ScalarType::Float;
template <>
inline constexpr ScalarType kDtype<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kDtype<BFloat16> = ScalarType::BFloat16;
template <>
inline constexpr ScalarType kDtype<Half> = ScalarType::Half;

// Relative rounding error of one operation in T.
template <typename T>
inline constexpr double kUnit = 0x1p-24;
template <>
inline constexpr double kUnit<double> = 0x1p-53;
template <>
inline constexpr double kUnit<BFloat16> = 0x1p-9;
template <>
inline constexpr double kUnit<Half> = 0x1p-12;

template <typename... Parts>
[[noreturn]] void fail(const char* format, Parts... parts) {
  std::fprintf(stderr, format, parts...);
  std::fprintf(stderr, "\n");
  std::exit(1);
}

inline void check_close(const std::string& what, int64_t position, double actual, double expected,
                        double bound) {
  if (std::abs(actual - expected) <= bound) return;
  fail("%s: element %lld is %.17g, expected %.17g within %.3g", what.c_str(),
       static_cast<long long>(position), actual, expected, bound);
}

// `count` elements, of which the first lies `offset` elements after a 16-byte boundary. The
// allocation ends with the last one, so that the address sanitizer sees one too many; those before
// the first are compared afterwards.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, int64_t offset, std::mt19937_64& random)
      : count_(count), offset_(offset), bytes_(new char[(offset + count) * sizeof(T)]) {
    std::uniform_real_distribution<double> uniform(-2.0, 2.0);
    for (int64_t i = -offset_; i < count_; ++i) {
      data()[i] = static_cast<T>(uniform(random));
      before_.push_back(data()[i]);
    }
  }

  T* data() const { return reinterpret_cast<T*>(bytes_.get()) + offset_; }
  int64_t count() const { return count_; }
  double operator[](int64_t i) const { return static_cast<double>(data()[i]); }
  // The value that element i began with.
  double before(int64_t i) const { return static_cast<double>(before_[i + offset_]); }

  // As if it had been the value to begin with.
  void set(int64_t i, double value) { data()[i] = before_[i + offset_] = static_cast<T>(value); }

  // `except(i)` says which elements may have been written.
  template <typename Except>
  void check_unchanged(const std::string& what, Except except) const {
    for (int64_t i = -offset_; i < count_; ++i) {
      if (!except(i) && memcmp(&data()[i], &before_[i + offset_], sizeof(T)) != 0) {
        fail("%s: element %lld was written", what.c_str(), static_cast<long long>(i));
      }
    }
  }

 private:
  int64_t count_;
  int64_t offset_;
  std::unique_ptr<char[]> bytes_;
  std::vector<T> before_;
};

}  // namespace sbp_fast::check
