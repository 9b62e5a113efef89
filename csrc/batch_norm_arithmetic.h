// The arithmetic of batch norm, one element at a time: what every native kernel, on the host or on
// a CUDA device, must compute. `T` is the type it computes in, or on the host a vector of it.
#pragma once

#include "arithmetic.h"

namespace sbp_fast {

// y = (x - mean) * scale + shift. The mean is taken off first: far from zero, x * scale and
// mean * scale would cancel.
template <typename T>
SBP_FAST_HOST_DEVICE T normalise(T x, T mean, T scale, T shift) {
  return (x - mean) * scale + shift;
}

// dx = a * dy + b * (x - mean) + c.
template <typename T>
SBP_FAST_HOST_DEVICE T gradient_of_input(T dy, T x, T mean, T a, T b, T c) {
  return a * dy + (b * (x - mean) + c);
}

// What to add to (x - rounded_mean) * factor in the place of `addend`, so that it is
// (x - mean) * factor + addend after all. `rounded_mean` is the mean in the type of the kernel:
// where the mean is many times the standard deviation, its rounding would be felt in every element.
// A mean or factor that is not finite has nothing to correct.
SBP_FAST_HOST_DEVICE double corrected_addend(double mean, double rounded_mean, double factor,
                                             double addend) {
  const double correction = (rounded_mean - mean) * factor;
  return is_non_finite(correction) ? addend : addend + correction;
}

// How far the mean of `count` values lies from a pivot, and the sum of their squared distances from
// that mean; from sums of their distances from the pivot. Squares cancel only as far as the pivot
// lies from the mean: where it is the mean of n of the values, `sum_squares` is at most count / n
// times the result, and usually little more than it. T. F. Chan, G. H. Golub and R. J. LeVeque,
// "Algorithms for computing the sample variance", The American Statistician 37(3), 1983, section 4.
struct Moments {
  double distance;
  double m2;
};

SBP_FAST_HOST_DEVICE Moments moments_about_pivot(double sum, double sum_squares, double count) {
  const double distance = sum / count;
  const double m2 = sum_squares - sum * distance;
  return {distance, m2 < 0.0 ? 0.0 : m2};  // rounding may leave less than nothing; NaN stays
}

// A value that is not finite cannot be a pivot: it would make NaN of an infinite mean.
SBP_FAST_HOST_DEVICE double usable_pivot(double value) {
  return is_non_finite(value) ? 0.0 : value;
}

}  // namespace sbp_fast
