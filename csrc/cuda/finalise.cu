// sbp_fast::finalise_ on CUDA tensors.
#include "call.h"
#include "finalise.cuh"

namespace sbp_fast::cuda {
namespace {

void finalise(StableIValue* stack, uint64_t, uint64_t) {
  const FinaliseArguments arguments = read_finalise(stack);
  const Plan plan =
      plan_call("finalise_", "outputs and accumulators", arguments.outputs, arguments.accumulators);
  if (plan.chunks() == 0) return;
  const Device device(arguments.outputs[0]);
  const Tables tables(device, plan);
  Coefficient coefficient{arguments.scale.const_data<double>(), nullptr, 0.0};
  if (arguments.norm) {
    coefficient.norm = arguments.norm->const_data<double>();
    coefficient.max_norm = *arguments.max_norm;
  }

  for (const Launch& launch : plan.flat_launches) {
    with_gradient_type(launch.written_dtype, [&]<typename output_t>() {
      with_accumulator_type(launch.read_dtype, [&]<typename accumulator_t>() {
        device.launch("finalise_flat", finalise_flat<output_t, accumulator_t>, launch.count,
                      tables.flat_chunks() + launch.first, coefficient);
      });
    });
  }
  for (const Launch& launch : plan.strided_launches) {
    with_gradient_type(launch.written_dtype, [&]<typename output_t>() {
      with_accumulator_type(launch.read_dtype, [&]<typename accumulator_t>() {
        device.launch("finalise_strided", finalise_strided<output_t, accumulator_t>, launch.count,
                      tables.strided_pairs(), tables.strided_chunks() + launch.first, coefficient);
      });
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CUDA, library) { library.impl("finalise_", &finalise); }

}  // namespace sbp_fast::cuda
