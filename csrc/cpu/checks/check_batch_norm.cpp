// The batch norm kernels of one instruction set against the same computed in long double, on
// buffers that end where their elements end.
#include <typeinfo>

#include "../../emulation/check.h"
#include "../batch_norm_maps.h"
#include "../batch_norm_sums.h"

namespace sbp_fast::cpu {
namespace {

using check::Buffer;

// A kernel rounds in the type that it computes in, a few times, and once to the dtype that it
// stores.
template <typename storage_t>
inline constexpr double kRounding =
    2 * check::kUnit<storage_t> + 8 * check::kUnit<ComputeType<storage_t>>;
inline constexpr double kSumRounding = 1e-13;

// Calls visit(channel, offset) for every element of the block.
template <typename Visit>
void for_each(const ChannelBlock& block, Visit visit) {
  for (int64_t channel = 0; channel < block.channels; ++channel) {
    for (int64_t run = 0; run < block.outer; ++run) {
      for (int64_t i = 0; i < block.inner; ++i) {
        visit(channel, run * block.outer_stride + channel * block.channel_stride + i);
      }
    }
  }
}

// A sum and the sum of the magnitudes of its terms.
struct Sum {
  long double value = 0.0;
  long double magnitude = 0.0;

  void add(long double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

template <typename storage_t>
class Case {
 public:
  Case(const ChannelBlock& block, int64_t offset, std::mt19937_64& random)
      : what_(std::string(typeid(storage_t).name()) + " " + std::to_string(block.outer) + " x " +
              std::to_string(block.channels) + " x " + std::to_string(block.inner)),
        block_(block),
        elements_((block.outer - 1) * block.outer_stride +
                  (block.channels - 1) * block.channel_stride + block.inner),
        offset_(offset),
        random_(random),
        input_(elements_, offset, random),
        grad_output_(elements_, offset, random) {
    for (int row = 0; row < 4; ++row) rows_.emplace_back(block.channels, 0, random);
  }

  void check_moments() const {
    const Buffer<double> pivot = new_row(), distance = new_row(), m2 = new_row();
    moments_of_block<storage_t>(input_.data(), block_, {pivot.data(), distance.data(), m2.data()});
    std::vector<Sum> mean(block_.channels), squares(block_.channels);
    const auto count = static_cast<long double>(block_.outer * block_.inner);
    for_each(block_, [&](int64_t channel, int64_t at) { mean[channel].add(input_[at] / count); });
    for_each(block_, [&](int64_t channel, int64_t at) {
      const long double apart = input_[at] - mean[channel].value;
      squares[channel].add(apart * apart);
    });
    for (int64_t channel = 0; channel < block_.channels; ++channel) {
      check_sum("mean", channel, pivot[channel] + distance[channel], mean[channel]);
      check_sum("m2", channel, m2[channel], squares[channel]);
    }
  }

  void check_backward_sums() const {
    const Buffer<double> sum = new_row(), product = new_row();
    backward_sums_of_block<storage_t>(grad_output_.data(), input_.data(), block_, rows_[0].data(),
                                      rows_[1].data(), sum.data(), product.data());
    std::vector<Sum> sums(block_.channels), products(block_.channels);
    for_each(block_, [&](int64_t channel, int64_t at) {
      const long double apart = input_[at] - static_cast<long double>(rows_[0][channel]);
      sums[channel].add(grad_output_[at]);
      products[channel].add(grad_output_[at] * (apart * rows_[1][channel]));
    });
    for (int64_t channel = 0; channel < block_.channels; ++channel) {
      check_sum("sum", channel, sum[channel], sums[channel]);
      check_sum("product", channel, product[channel], products[channel]);
    }
  }

  void check_normalise() const {
    const Buffer<storage_t> output(elements_, offset_, random_);
    normalise_block<storage_t>(output.data(), input_.data(), block_, rows_[0].data(),
                               rows_[1].data(), rows_[2].data());
    check_elements("normalise", output, [&](int64_t channel, int64_t at, Sum& sum) {
      sum.add(input_[at] * rows_[1][channel]);
      sum.add(-rows_[0][channel] * rows_[1][channel]);
      sum.add(rows_[2][channel]);
    });
  }

  void check_input_gradient() const {
    const Buffer<storage_t> grad_input(elements_, offset_, random_);
    input_gradient_block<storage_t>(grad_input.data(), grad_output_.data(), input_.data(), block_,
                                    rows_[0].data(), rows_[1].data(), rows_[2].data(),
                                    rows_[3].data());
    check_elements("input gradient", grad_input, [&](int64_t channel, int64_t at, Sum& sum) {
      sum.add(rows_[1][channel] * grad_output_[at]);
      sum.add(rows_[2][channel] * input_[at]);
      sum.add(-rows_[2][channel] * rows_[0][channel]);
      sum.add(rows_[3][channel]);
    });
  }

 private:
  Buffer<double> new_row() const { return Buffer<double>(block_.channels, 0, random_); }

  void check_sum(const char* name, int64_t channel, double actual, const Sum& expected) const {
    check::check_close(what_ + ": " + name, channel, actual, static_cast<double>(expected.value),
                       kSumRounding * static_cast<double>(expected.magnitude));
  }

  template <typename AddTerms>
  void check_elements(const char* name, const Buffer<storage_t>& result, AddTerms add_terms) const {
    std::vector<bool> in_block(elements_, false);
    for_each(block_, [&](int64_t channel, int64_t at) {
      in_block[at] = true;
      Sum sum;
      add_terms(channel, at, sum);
      check::check_close(what_ + ": " + name, at, result[at], static_cast<double>(sum.value),
                         kRounding<storage_t> * static_cast<double>(sum.magnitude));
    });
    result.check_unchanged(what_ + ": " + name,
                           [&](int64_t at) { return at >= 0 && in_block[at]; });
  }

  std::string what_;
  ChannelBlock block_;
  int64_t elements_;
  int64_t offset_;
  std::mt19937_64& random_;
  Buffer<storage_t> input_;
  Buffer<storage_t> grad_output_;
  std::vector<Buffer<double>> rows_;
};

template <typename storage_t>
void check_type(std::mt19937_64& random) {
  const auto check = [&](const ChannelBlock& block, int64_t offset) {
    const Case<storage_t> one(block, offset, random);
    one.check_moments();
    one.check_backward_sums();
    one.check_normalise();
    one.check_input_gradient();
  };
  int64_t offset = 0;
  for (const int64_t inner : {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 71}) {
    for (const int64_t channels : {1, 5, 17, 35}) {
      for (const int64_t outer : {1, 9}) {
        check({outer, channels * inner, channels, inner, inner}, offset++ % 3);
      }
    }
  }
  // More columns than a group has, more rows than a tile; and a part of a larger tensor.
  for (const int64_t inner : {1, 2}) check({10, 600 * inner, 600, inner, inner}, 1);
  check({70, 40, 33, 1, 1}, 0);
  check({3, 1000, 4, 200, 131}, 1);
}

}  // namespace
}  // namespace sbp_fast::cpu

int main() {
  std::mt19937_64 random(3);
  sbp_fast::cpu::check_type<float>(random);
  sbp_fast::cpu::check_type<double>(random);
  sbp_fast::cpu::check_type<sbp_fast::BFloat16>(random);
  sbp_fast::cpu::check_type<sbp_fast::Half>(random);
}
