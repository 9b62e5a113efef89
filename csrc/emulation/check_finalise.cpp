// The finalise kernels against the same computed in double, one element at a time.
#include "../cuda/finalise.cuh"
#include "cases.h"

namespace sbp_fast::check {
namespace {

struct Clip {
  double norm;
  double max_norm;
};

double factor_of(double scale, const Clip* clip) {
  if (clip == nullptr) return scale;
  return scale * std::min(1.0, clip->max_norm / (clip->norm + 1e-6));
}

void launch_plan(const cuda::Plan& plan, auto flat_kernel, auto strided_kernel,
                 const cuda::Coefficient& coefficient) {
  emulation::launch(flat_kernel, static_cast<int64_t>(plan.flat_chunks.size()), kThreads,
                    plan.flat_chunks.data(), coefficient);
  emulation::launch(strided_kernel, static_cast<int64_t>(plan.strided_chunks.size()), kThreads,
                    plan.strided_pairs.data(), plan.strided_chunks.data(), coefficient);
}

template <typename output_t, typename accumulator_t>
void check_pair(const Clip* clip, std::mt19937_64& random) {
  const std::string what = "finalise " + std::string(typeid(output_t).name()) + " " +
                           typeid(accumulator_t).name() + (clip ? " clipped" : "");
  const double scale = 0.7;
  const auto tensors = make_tensors<output_t, accumulator_t>(random);
  launch_plan(plan_of(tensors), cuda::finalise_flat<output_t, accumulator_t>,
              cuda::finalise_strided<output_t, accumulator_t>,
              {&scale, clip ? &clip->norm : nullptr, clip ? clip->max_norm : 0.0});
  const double factor = factor_of(scale, clip);
  // A subnormal half rounds to a fixed step, not to a share of its value.
  const double smallest = std::is_same_v<output_t, Half> ? 0x1p-25 : 0.0;
  for (const auto& tensor : tensors) {
    tensor.check_guards(what);
    tensor.for_each([&](int64_t to, int64_t from) {
      const double expected = factor * tensor.read[from];
      const double bound =
          (2 * kUnit<output_t> + 3 * kUnit<accumulator_t>)*std::abs(expected) + smallest;
      check_close(what, to, tensor.written[to], expected, bound);
    });
  }
}

// Outputs that are the accumulators themselves.
template <typename T>
void check_in_place(std::mt19937_64& random) {
  const double scale = 0.25;
  for (const int64_t offset : {0, 1}) {
    const Buffer<T> tensor(2 * kChunk + 9, offset, random);
    const cuda::Pair pair{tensor.data(),  tensor.data(), kDtype<T>, kDtype<T>,
                          tensor.count(), true,          0,         nullptr,
                          nullptr,        nullptr};
    launch_plan(cuda::make_plan({pair}, kChunk), cuda::finalise_flat<T, T>,
                cuda::finalise_strided<T, T>, {&scale, nullptr, 0.0});
    for (int64_t i = 0; i < tensor.count(); ++i) {
      check_close("finalise in place", i, tensor[i], scale * tensor.before(i), 0.0);
    }
  }
}

void check_nan_norm(std::mt19937_64& random) {
  const double scale = 1.0;
  const double norm = NAN;
  const Buffer<float> output(33, 0, random);
  const Buffer<float> accumulator(33, 0, random);
  const cuda::Pair pair{output.data(),
                        accumulator.data(),
                        kDtype<float>,
                        kDtype<float>,
                        output.count(),
                        true,
                        0,
                        nullptr,
                        nullptr,
                        nullptr};
  launch_plan(cuda::make_plan({pair}, kChunk), cuda::finalise_flat<float, float>,
              cuda::finalise_strided<float, float>, {&scale, &norm, 1.0});
  for (int64_t i = 0; i < output.count(); ++i) {
    if (!std::isnan(output[i])) fail("finalise: a NaN norm left element %d finite", int(i));
  }
}

}  // namespace
}  // namespace sbp_fast::check

int main() {
  using namespace sbp_fast::check;
  std::mt19937_64 random(3);
  const Clip clips[] = {{2.0, 0.5}, {0.1, 0.5}};
  for (const Clip* clip : {static_cast<const Clip*>(nullptr), &clips[0], &clips[1]}) {
    check_pair<float, float>(clip, random);
    check_pair<float, double>(clip, random);
    check_pair<double, float>(clip, random);
    check_pair<double, double>(clip, random);
    check_pair<sbp_fast::BFloat16, float>(clip, random);
    check_pair<sbp_fast::BFloat16, double>(clip, random);
    check_pair<sbp_fast::Half, float>(clip, random);
    check_pair<sbp_fast::Half, double>(clip, random);
  }
  check_in_place<float>(random);
  check_in_place<double>(random);
  check_nan_norm(random);
}
