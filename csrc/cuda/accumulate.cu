// sbp_fast::scale_accumulate_ on CUDA tensors.
#include "accumulate.cuh"
#include "partials.h"

namespace sbp_fast::cuda {
namespace {

template <typename accumulator_t, typename gradient_t>
auto flat_kernel(bool first_write, bool statistics) {
  if (first_write) {
    return statistics ? accumulate_flat<accumulator_t, gradient_t, true, true>
                      : accumulate_flat<accumulator_t, gradient_t, true, false>;
  }
  return statistics ? accumulate_flat<accumulator_t, gradient_t, false, true>
                    : accumulate_flat<accumulator_t, gradient_t, false, false>;
}

void scale_accumulate(StableIValue* stack, uint64_t, uint64_t) {
  const ScaleAccumulateArguments arguments = read_scale_accumulate(stack);
  const Plan plan = plan_call("scale_accumulate_", "accumulators and gradients",
                              arguments.accumulators, arguments.gradients);
  if (plan.chunks() == 0) return;
  const TensorView* statistics = arguments.statistics ? &*arguments.statistics : nullptr;
  const Device device(arguments.accumulators[0]);
  const Tables tables(device, plan);
  const Partials partials(device, plan, statistics);

  for (const Launch& launch : plan.flat_launches) {
    with_accumulator_type(launch.written_dtype, [&]<typename accumulator_t>() {
      with_gradient_type(launch.read_dtype, [&]<typename gradient_t>() {
        device.launch(
            "accumulate_flat",
            flat_kernel<accumulator_t, gradient_t>(arguments.first_write, statistics != nullptr),
            launch.count, tables.flat_chunks() + launch.first, arguments.scale,
            partials.of_flat(launch));
      });
    });
  }
  for (const Launch& launch : plan.strided_launches) {
    with_accumulator_type(launch.written_dtype, [&]<typename accumulator_t>() {
      with_gradient_type(launch.read_dtype, [&]<typename gradient_t>() {
        device.launch("accumulate_strided", accumulate_strided<accumulator_t, gradient_t>,
                      launch.count, tables.strided_pairs(), tables.strided_chunks() + launch.first,
                      arguments.scale, arguments.first_write, partials.of_strided(plan, launch));
      });
    });
  }
  partials.add_up();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CUDA, library) {
  library.impl("scale_accumulate_", &scale_accumulate);
}

}  // namespace sbp_fast::cuda
