// sbp_fast::gradient_statistics_ on CUDA tensors.
#include "partials.h"
#include "statistics.cuh"

namespace sbp_fast::cuda {
namespace {

Plan plan_statistics(const TensorViews& gradients) {
  std::vector<Pair> pairs;
  pairs.reserve(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    const void* data = gradients[i].const_data<void>();
    // The kernels of this op write to no tensor: the constness is put aside, not broken.
    pairs.push_back(checked_pair("gradient_statistics_", "gradients", i, const_cast<void*>(data),
                                 gradients[i], data, gradients[i]));
  }
  return make_plan(pairs);
}

void gradient_statistics(StableIValue* stack, uint64_t, uint64_t) {
  const GradientStatisticsArguments arguments = read_gradient_statistics(stack);
  const Plan plan = plan_statistics(arguments.gradients);
  if (plan.chunks() == 0) return;
  const Device device(arguments.gradients[0]);
  const Tables tables(device, plan);
  const Partials partials(device, plan, &arguments.statistics);

  for (const Launch& launch : plan.flat_launches) {
    with_gradient_type(launch.read_dtype, [&]<typename gradient_t>() {
      device.launch("statistics_flat", statistics_flat<gradient_t>, launch.count,
                    tables.flat_chunks() + launch.first, partials.of_flat(launch));
    });
  }
  for (const Launch& launch : plan.strided_launches) {
    with_gradient_type(launch.read_dtype, [&]<typename gradient_t>() {
      device.launch("statistics_strided", statistics_strided<gradient_t>, launch.count,
                    tables.strided_pairs(), tables.strided_chunks() + launch.first,
                    partials.of_strided(plan, launch));
    });
  }
  partials.add_up();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CUDA, library) {
  library.impl("gradient_statistics_", &gradient_statistics);
}

}  // namespace sbp_fast::cuda
