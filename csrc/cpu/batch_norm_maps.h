// The two elementwise kernels of batch norm over one block. They compute in float32, or in float64
// for float64. Included once per instruction set.
#pragma once

#include <array>
#include <type_traits>

#include "../batch_norm_arithmetic.h"
#include "batch_norm_kernels.h"
#include "expand.h"
#include "vector.h"

namespace sbp_fast::cpu {
namespace {

template <typename storage_t>
using ComputeType = std::conditional_t<std::is_same_v<storage_t, double>, double, float>;

// How results are computed: a vector at a time, or singly where there are fewer.
template <typename T>
struct ManyElements {
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
  using Value = Vector<T, kLanes>;
  template <typename storage_t>
  static Value load(const storage_t* address) {
    return load_as<T, kLanes>(address);
  }
  template <typename storage_t>
  static void store(storage_t* address, Value value) {
    store_as<kLanes, T>(address, value);
  }
  static Value broadcast(T value) { return value - Value{}; }
};

template <typename T>
struct OneElement {
  using Value = T;
  template <typename storage_t>
  static T load(const storage_t* address) {
    return static_cast<T>(*address);
  }
  template <typename storage_t>
  static void store(storage_t* address, T value) {
    *address = static_cast<storage_t>(value);
  }
};

// Coefficients by channel in float64: first the mean, then others, of which the last but one is the
// factor of (x - mean) and the last is added to it.
template <int kRows>
using Rows = std::array<const double*, kRows>;

// The same of a group of channels, in the type that the kernel computes in.
template <typename T, int kRows>
struct GroupRows {
  T row[kRows][kGroupColumns];

  GroupRows(const Rows<kRows>& exact, Group group) {
    for (int64_t i = 0; i < group.channels; ++i) {
      const int64_t channel = group.first + i;
      for (int r = 0; r < kRows; ++r) row[r][i] = static_cast<T>(exact[r][channel]);
      if constexpr (!std::is_same_v<T, double>) {
        row[kRows - 1][i] = static_cast<T>(corrected_addend(
            exact[0][channel], row[0][i], exact[kRows - 2][channel], exact[kRows - 1][channel]));
      }
    }
  }
};

// Those of a vector of elements.
template <typename Value, int kRows>
using Coefficients = std::array<Value, kRows>;

// Lambdas hold pointers by value: what is written through one could otherwise be another, for all
// that the compiler knows, and each would be read again for every vector.
template <typename T, int kRows, typename Map>
inline void map_runs(const ChannelBlock& block, const Rows<kRows>& rows, const Map map) {
  using Many = ManyElements<T>;
  constexpr int kLanes = Many::kLanes;
  for (const Group group : Groups(block.channels, 1)) {
    const GroupRows<T, kRows> coefficients(rows, group);
    for (int64_t run = 0; run < block.outer; ++run) {
      for (int64_t channel = 0; channel < group.channels; ++channel) {
        Coefficients<typename Many::Value, kRows> values;
        for (int r = 0; r < kRows; ++r) values[r] = Many::broadcast(coefficients.row[r][channel]);
        int64_t i = run * block.outer_stride + (group.first + channel) * block.channel_stride;
        const int64_t end = i + block.inner;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
          map(Many(), i, values);
          map(Many(), i + kLanes, values);
        }
        if (i + kLanes <= end) {
          map(Many(), i, values);
          i += kLanes;
        }
        if (i < end) map(Many(), end - kLanes, values);
      }
    }
  }
}

// Rows of a group of columns, of which the first element of the first row is at `begin`. They share
// the loads of the coefficients.
template <int kTogether, typename T, int kRows, typename Map>
inline void map_rows(int64_t begin, int64_t stride, int64_t columns,
                     const T (&expanded)[kRows][kExpandedColumns<T>], const Map map) {
  using Many = ManyElements<T>;
  constexpr int kLanes = Many::kLanes;
  const auto map_at = [&]<typename Lanes>(Lanes lanes, int64_t column) {
    Coefficients<typename Lanes::Value, kRows> values;
    for (int r = 0; r < kRows; ++r) values[r] = Lanes::load(expanded[r] + column);
    for (int k = 0; k < kTogether; ++k) map(lanes, begin + k * stride + column, values);
  };
  int64_t column = 0;
  for (; column + kLanes <= columns; column += kLanes) map_at(Many(), column);
  if (column == columns) return;
  if (columns >= kLanes) return map_at(Many(), columns - kLanes);
  for (; column < columns; ++column) map_at(OneElement<T>(), column);
}

template <typename T, int kRows, typename Map>
inline void map_columns(const ChannelBlock& block, const Rows<kRows>& rows, const Map map) {
  constexpr int kTogether = 2;
  for (const Group group : Groups(block.channels, block.inner)) {
    const GroupRows<T, kRows> coefficients(rows, group);
    T expanded[kRows][kExpandedColumns<T>];
    for (int r = 0; r < kRows; ++r) {
      expand(coefficients.row[r], group.channels, block.inner, expanded[r]);
    }
    const int64_t columns = group.channels * block.inner;
    const int64_t begin = group.first * block.inner;
    int64_t row = 0;
    for (; row + kTogether <= block.outer; row += kTogether) {
      map_rows<kTogether>(begin + row * block.outer_stride, block.outer_stride, columns, expanded,
                          map);
    }
    for (; row < block.outer; ++row) {
      map_rows<1>(begin + row * block.outer_stride, block.outer_stride, columns, expanded, map);
    }
  }
}

// Calls map(lanes, offset, coefficients) until every element of the block was reached; some are
// reached twice.
template <typename T, int kRows, typename Map>
inline void map_block(const ChannelBlock& block, const Rows<kRows>& rows, const Map map) {
  if (block.inner >= ManyElements<T>::kLanes) {
    map_runs<T, kRows>(block, rows, map);
  } else {
    map_columns<T, kRows>(block, rows, map);
  }
}

template <typename storage_t>
void normalise_block(void* output_data, const void* input_data, const ChannelBlock& block,
                     const double* mean, const double* scale, const double* shift) {
  using T = ComputeType<storage_t>;
  auto* output = static_cast<storage_t*>(output_data);
  const auto* input = static_cast<const storage_t*>(input_data);
  map_block<T, 3>(
      block, {mean, scale, shift}, [=]<typename Lanes>(Lanes, int64_t i, const auto& row) {
        Lanes::store(output + i, normalise(Lanes::load(input + i), row[0], row[1], row[2]));
      });
}

template <typename storage_t>
void input_gradient_block(void* grad_input_data, const void* grad_output_data,
                          const void* input_data, const ChannelBlock& block, const double* mean,
                          const double* a, const double* b, const double* c) {
  using T = ComputeType<storage_t>;
  auto* grad_input = static_cast<storage_t*>(grad_input_data);
  const auto* grad_output = static_cast<const storage_t*>(grad_output_data);
  const auto* input = static_cast<const storage_t*>(input_data);
  map_block<T, 4>(block, {mean, a, b, c}, [=]<typename Lanes>(Lanes, int64_t i, const auto& row) {
    Lanes::store(grad_input + i,
                 gradient_of_input(Lanes::load(grad_output + i), Lanes::load(input + i), row[0],
                                   row[1], row[2], row[3]));
  });
}

}  // namespace
}  // namespace sbp_fast::cpu
