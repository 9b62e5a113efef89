// The batch norm kernels against the same computed in long double, one channel at a time.
#include "../cuda/batch_norm.cuh"
#include "check.h"

namespace sbp_fast::check {
namespace {

constexpr unsigned kThreads = 64;

// Sums of channels are off by the rounding of single terms.
template <typename T>
inline constexpr double kSumUnit = kUnit<cuda::Computed<T>>;

// `outer` times `channels` runs of `inner` elements, from so many elements after a 16-byte
// boundary.
struct Case {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t offset;
};

// Lines shorter and longer than what a block walks at once, alone and in numbers; lanes that fill a
// block and that do not; tails of all loops; and nothing.
constexpr Case kCases[] = {
    {3, 5, 48, 0},  {3, 5, 63, 0},  {70, 2, 8, 0},  {1, 2, 2500, 0}, {2, 3, 1200, 1},
    {1, 1, 9, 0},   {70, 24, 1, 0}, {9, 600, 1, 0}, {300, 5, 1, 0},  {41, 16, 1, 1},
    {90, 72, 1, 0}, {2, 264, 1, 0}, {1, 7, 1, 0},
};

template <typename T>
struct Batch {
  Batch(const Case& described, std::mt19937_64& random)
      : layout(described),
        grad_output(numel(), described.offset, random),
        input(numel(), described.offset, random),
        output(numel(), described.offset, random),
        coefficients(4 * described.channels, 0, random) {}

  int64_t numel() const { return layout.outer * layout.channels * layout.inner; }
  int64_t channel_of(int64_t element) const { return element / layout.inner % layout.channels; }

  cuda::ChannelCut cut(int width) const {
    return cuda::cut_channels(layout.outer, layout.channels, layout.inner, width, kThreads, 4);
  }

  void check_guards(const std::string& what, bool writes) const {
    grad_output.check_unchanged(what, [](int64_t) { return false; });
    input.check_unchanged(what, [](int64_t) { return false; });
    output.check_unchanged(what, [&](int64_t i) { return writes && i >= 0; });
  }

  Case layout;
  Buffer<T> grad_output;
  Buffer<T> input;
  Buffer<T> output;
  Buffer<double> coefficients;
};

// Calls function.operator()<kPlanes, kWidth>() as the launches choose.
template <typename T, typename Function>
void with_walk(const Case& layout, const Function& function) {
  constexpr int kVector = cuda::kVectorWidth<T, T>;
  const bool planes = layout.inner > 1;
  const bool vectors =
      layout.offset == 0 && (planes ? layout.inner : layout.channels) % kVector == 0;
  if (planes) {
    vectors ? function.template operator()<true, kVector>()
            : function.template operator()<true, 1>();
  } else {
    vectors ? function.template operator()<false, kVector>()
            : function.template operator()<false, 1>();
  }
}

template <typename State>
std::vector<double> merged(const cuda::ChannelCut& cut, std::vector<double> partials) {
  std::vector<double> results(2 * cut.channels);
  const int64_t lanes = std::min(cut.channels, cuda::kMostLanes);
  emulation::launch(cuda::merge_chunks<State>, cuda::quotient_up(cut.channels, lanes), kThreads,
                    static_cast<const double*>(partials.data()), cut.chunks, cut.channels,
                    results.data());
  return results;
}

template <typename State>
std::vector<double> room_for(const cuda::ChannelCut& cut) {
  return std::vector<double>(State::kRows * cut.chunks * cut.channels, NAN);
}

template <typename T>
void check_statistics(const Batch<T>& batch) {
  using State = cuda::ChannelMoments<1>;
  const std::string what = "batch norm statistics " + std::string(typeid(T).name());
  std::vector<double> results;
  with_walk<T>(batch.layout, [&]<bool kPlanes, int kWidth>() {
    const cuda::ChannelCut cut = batch.cut(kWidth);
    std::vector<double> partials = room_for<State>(cut);
    emulation::launch(cuda::batch_norm_statistics<kPlanes, kWidth, T>, cut.blocks(), kThreads,
                      batch.input.data(), cut, State::kRows, partials.data());
    results = merged<State>(cut, std::move(partials));
  });
  batch.check_guards(what, false);
  const int64_t channels = batch.layout.channels;
  std::vector<long double> mean(channels), squares(channels);
  const long double count = batch.layout.outer * batch.layout.inner;
  for (int64_t i = 0; i < batch.numel(); ++i) {
    mean[batch.channel_of(i)] += batch.input[i] / count;
  }
  for (int64_t i = 0; i < batch.numel(); ++i) {
    const long double apart = batch.input[i] - mean[batch.channel_of(i)];
    squares[batch.channel_of(i)] += apart * apart;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double deviation = std::sqrt(squares[c] / count);
    check_close(what + ": mean", c, results[c], mean[c], 5 * kSumUnit<T> * deviation + 1e-15);
    check_close(what + ": M2", c, results[channels + c], squares[c], 5 * kSumUnit<T> * squares[c]);
  }
}

template <typename T>
void check_backward_statistics(const Batch<T>& batch) {
  using State = cuda::ChannelSums<1>;
  const std::string what = "batch norm backward statistics " + std::string(typeid(T).name());
  std::vector<double> results;
  with_walk<T>(batch.layout, [&]<bool kPlanes, int kWidth>() {
    const cuda::ChannelCut cut = batch.cut(kWidth);
    std::vector<double> partials = room_for<State>(cut);
    emulation::launch(cuda::batch_norm_backward_statistics<kPlanes, kWidth, T>, cut.blocks(),
                      kThreads, batch.grad_output.data(), batch.input.data(),
                      batch.coefficients.data(), cut, State::kRows, partials.data());
    results = merged<State>(cut, std::move(partials));
  });
  batch.check_guards(what, false);
  const int64_t channels = batch.layout.channels;
  std::vector<long double> sums(channels), products(channels);
  std::vector<long double> size(channels), size_of_products(channels);
  for (int64_t i = 0; i < batch.numel(); ++i) {
    const int64_t c = batch.channel_of(i);
    const long double dy = batch.grad_output[i];
    const long double product =
        dy * (batch.input[i] - batch.coefficients[c]) * batch.coefficients[channels + c];
    sums[c] += dy;
    products[c] += product;
    size[c] += std::abs(dy);
    size_of_products[c] += std::abs(product);
  }
  for (int64_t c = 0; c < channels; ++c) {
    check_close(what + ": sum", c, results[c], sums[c], 5 * kSumUnit<T> * size[c]);
    check_close(what + ": product", c, results[channels + c], products[c],
                5 * kSumUnit<T> * size_of_products[c]);
  }
}

template <typename T>
void check_outputs(const Batch<T>& batch, bool backward) {
  const std::string what =
      std::string("batch norm ") + (backward ? "backward " : "normalise ") + typeid(T).name();
  with_walk<T>(batch.layout, [&]<bool kPlanes, int kWidth>() {
    const cuda::ChannelCut cut = batch.cut(kWidth);
    const double* coefficients = batch.coefficients.data();
    if (backward) {
      emulation::launch(cuda::batch_norm_backward_apply<kPlanes, kWidth, T>, cut.blocks(), kThreads,
                        batch.grad_output.data(), batch.input.data(), coefficients, cut,
                        batch.output.data());
    } else {
      emulation::launch(cuda::batch_norm_normalise<kPlanes, kWidth, T>, cut.blocks(), kThreads,
                        batch.input.data(), coefficients, cut, batch.output.data());
    }
  });
  batch.check_guards(what, true);
  // A subnormal half rounds to a fixed step, not to a share of its value.
  const double smallest = std::is_same_v<T, Half> ? 0x1p-25 : 0.0;
  for (int64_t i = 0; i < batch.numel(); ++i) {
    const int64_t c = batch.channel_of(i);
    const auto coefficient = [&](int row) -> long double {
      return batch.coefficients[row * batch.layout.channels + c];
    };
    const long double apart = batch.input[i] - coefficient(0);
    const long double terms[] = {backward ? coefficient(1) * batch.grad_output[i] : 0.0L,
                                 coefficient(backward ? 2 : 1) * apart,
                                 coefficient(backward ? 3 : 2)};
    const long double expected = terms[0] + terms[1] + terms[2];
    const long double size = std::abs(terms[0]) + std::abs(terms[1]) + std::abs(terms[2]) +
                             std::abs(coefficient(backward ? 2 : 1) * coefficient(0));
    check_close(what, i, batch.output[i], expected,
                2 * kUnit<T> * std::abs(expected) + 5 * kSumUnit<T> * size + smallest);
  }
}

template <typename T>
void check_sums(std::mt19937_64& random) {
  for (const Case& layout : kCases) {
    check_statistics(Batch<T>(layout, random));
    check_backward_statistics(Batch<T>(layout, random));
  }
}

template <typename T>
void check_maps(std::mt19937_64& random) {
  for (const Case& layout : kCases) {
    check_outputs(Batch<T>(layout, random), false);
    check_outputs(Batch<T>(layout, random), true);
  }
}

}  // namespace
}  // namespace sbp_fast::check

int main() {
  using namespace sbp_fast::check;
  std::mt19937_64 random(4);
  check_sums<float>(random);
  check_sums<double>(random);
  // Of two narrow types, which differ in their conversions alone, one is enough.
  check_sums<sbp_fast::BFloat16>(random);
  check_maps<float>(random);
  check_maps<double>(random);
  check_maps<sbp_fast::BFloat16>(random);
  check_maps<sbp_fast::Half>(random);
}
