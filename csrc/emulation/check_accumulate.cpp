// The accumulation kernels against the same computed in double, one element at a time.
#include "../cuda/accumulate.cuh"
#include "cases.h"

namespace sbp_fast::check {
namespace {

constexpr double kScale = 0.3;

template <typename accumulator_t, typename gradient_t>
auto flat_kernel(bool first_write, bool statistics) {
  using namespace cuda;
  if (first_write) {
    return statistics ? accumulate_flat<accumulator_t, gradient_t, true, true>
                      : accumulate_flat<accumulator_t, gradient_t, true, false>;
  }
  return statistics ? accumulate_flat<accumulator_t, gradient_t, false, true>
                    : accumulate_flat<accumulator_t, gradient_t, false, false>;
}

template <typename accumulator_t, typename gradient_t>
void check_mode(bool first_write, bool statistics, bool non_finite, std::mt19937_64& random) {
  const std::string what = "accumulate " + std::string(typeid(accumulator_t).name()) + " " +
                           typeid(gradient_t).name() + (first_write ? " first write" : "") +
                           (statistics ? " statistics" : "");
  auto tensors = make_tensors<accumulator_t, gradient_t>(random);
  if (non_finite) tensors.back().read.set(5, INFINITY);
  const cuda::Plan plan = plan_of(tensors);
  std::vector<cuda::Partial> partials(plan.chunks());
  const auto flat = static_cast<int64_t>(plan.flat_chunks.size());
  const auto strided = static_cast<int64_t>(plan.strided_chunks.size());
  emulation::launch(flat_kernel<accumulator_t, gradient_t>(first_write, statistics), flat, kThreads,
                    plan.flat_chunks.data(), kScale, statistics ? partials.data() : nullptr);
  emulation::launch(cuda::accumulate_strided<accumulator_t, gradient_t>, strided, kThreads,
                    plan.strided_pairs.data(), plan.strided_chunks.data(), kScale, first_write,
                    statistics ? partials.data() + flat : nullptr);

  double squares_in = 1.0;
  double squares_result = 2.0;
  for (const auto& tensor : tensors) {
    tensor.check_guards(what);
    tensor.for_each([&](int64_t to, int64_t from) {
      const double incoming = tensor.read[from];
      const double before = first_write ? 0.0 : tensor.written.before(to);
      const double expected = before + kScale * incoming;
      const double bound =
          3 * kUnit<accumulator_t> * (std::abs(before) + kScale * std::abs(incoming));
      if (!std::isfinite(expected)) return;
      check_close(what, to, tensor.written[to], expected, bound);
      squares_in += incoming * incoming;
      squares_result += tensor.written[to] * tensor.written[to];
    });
  }
  if (!statistics) return;
  double actual[3] = {1.0, 2.0, 0.0};
  emulation::launch(cuda::add_partials, 1, kThreads,
                    static_cast<const cuda::Partial*>(partials.data()), plan.chunks(),
                    static_cast<double*>(actual));
  check_close(what + ": flag", 2, actual[2], non_finite ? 1.0 : 0.0, 0.0);
  if (non_finite) return;
  check_close(what + ": sum of squares in", 0, actual[0], squares_in, 1e-13 * squares_in);
  check_close(what + ": sum of squares of the result", 1, actual[1], squares_result,
              1e-13 * squares_result);
}

template <typename accumulator_t, typename gradient_t>
void check_pair(std::mt19937_64& random) {
  for (const bool first_write : {false, true}) {
    check_mode<accumulator_t, gradient_t>(first_write, false, false, random);
    check_mode<accumulator_t, gradient_t>(first_write, true, first_write, random);
  }
  check_mode<accumulator_t, gradient_t>(false, true, true, random);
}

}  // namespace
}  // namespace sbp_fast::check

int main() {
  using namespace sbp_fast::check;
  std::mt19937_64 random(1);
  check_pair<float, float>(random);
  check_pair<float, double>(random);
  check_pair<float, sbp_fast::BFloat16>(random);
  check_pair<float, sbp_fast::Half>(random);
  check_pair<double, float>(random);
  check_pair<double, double>(random);
  check_pair<double, sbp_fast::BFloat16>(random);
  check_pair<double, sbp_fast::Half>(random);
}
