// The statistics kernels against the same computed in long double.
#include "../cuda/statistics.cuh"
#include "cases.h"

namespace sbp_fast::check {
namespace {

template <typename gradient_t>
void check_type(double special, std::mt19937_64& random) {
  const std::string what = "statistics " + std::string(typeid(gradient_t).name());
  auto tensors = make_tensors<gradient_t, gradient_t>(random);
  tensors[3].read.set(63, special);
  const cuda::Plan plan = plan_of(tensors);
  std::vector<cuda::Partial> partials(plan.chunks());
  const auto flat = static_cast<int64_t>(plan.flat_chunks.size());
  const auto strided = static_cast<int64_t>(plan.strided_chunks.size());
  emulation::launch(cuda::statistics_flat<gradient_t>, flat, kThreads, plan.flat_chunks.data(),
                    partials.data());
  emulation::launch(cuda::statistics_strided<gradient_t>, strided, kThreads,
                    plan.strided_pairs.data(), plan.strided_chunks.data(), partials.data() + flat);
  double actual[3] = {0.5, 0.25, 0.0};
  emulation::launch(cuda::add_partials, 1, kThreads,
                    static_cast<const cuda::Partial*>(partials.data()), plan.chunks(),
                    static_cast<double*>(actual));

  long double squares = 0.0;
  for (const auto& tensor : tensors) {
    tensor.for_each([&](int64_t, int64_t from) {
      const long double value = tensor.read[from];
      squares += value * value;
    });
  }
  check_close(what + ": flag", 2, actual[2], std::isfinite(special) ? 0.0 : 1.0, 0.0);
  if (!std::isfinite(special)) return;
  const auto expected = static_cast<double>(squares);
  check_close(what, 0, actual[0], expected + 0.5, 1e-13 * expected);
  check_close(what, 1, actual[1], expected + 0.25, 1e-13 * expected);
}

}  // namespace
}  // namespace sbp_fast::check

int main() {
  using namespace sbp_fast::check;
  std::mt19937_64 random(2);
  for (const double special : {1.0, static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    check_type<float>(special, random);
    check_type<double>(special, random);
    check_type<sbp_fast::BFloat16>(special, random);
    check_type<sbp_fast::Half>(special, random);
  }
}
