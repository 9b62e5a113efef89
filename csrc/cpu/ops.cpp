// The ops on CPU tensors: one parallel region per call, chunks handed out as threads come free,
// partial statistics added in the chunks' order. Registration is at the end of the file.
#include <torch/csrc/stable/library.h>

#include "../chunks.h"
#include "../op_arguments.h"
#include "kernels.h"
#include "parallel.h"
#include "strided_kernels.h"

namespace sbp_fast::cpu {
namespace {

constexpr int64_t kChunkElements = 16384;
// A thread takes this many chunks at a time: few enough that threads finish together, many enough
// that the memory prefetchers see long runs.
constexpr int64_t kChunksPerTurn = 4;
// Above this size the accumulators will not be found in the caches again.
constexpr int64_t kStreamingBytes = int64_t{4} << 20;

template <typename Process>
void for_each_chunk(const std::vector<Chunk>& chunks, int64_t elements, Process process) {
  for_each_in_parallel(static_cast<int64_t>(chunks.size()), kChunksPerTurn, elements, process);
}

std::vector<Chunk> cut(const TensorViews& tensors) {
  return cut_into_chunks(static_cast<int64_t>(tensors.size()), kChunkElements,
                         [&](int64_t tensor) { return tensors[tensor].numel; });
}

int64_t count_elements(const TensorViews& tensors) {
  int64_t elements = 0;
  for (const TensorView& tensor : tensors) elements += tensor.numel;
  return elements;
}

int64_t count_bytes(const TensorViews& tensors) {
  int64_t bytes = 0;
  for (const TensorView& tensor : tensors) {
    bytes += tensor.numel * bytes_per_element(tensor.dtype);
  }
  return bytes;
}

void add_statistics(const TensorView& statistics, const std::vector<ChunkStatistics>& partials) {
  double* total = statistics.mutable_data<double>();
  for (const ChunkStatistics& partial : partials) {
    total[0] += partial.sum_squares_in;
    total[1] += partial.sum_squares_result;
    if (partial.non_finite) total[2] = 1.0;
  }
}

// A pair of tensors, each pointer read once per call.
struct Pair {
  char* written;
  const char* read;
  int64_t written_bytes;  // per element
  int64_t read_bytes;
  int written_dtype;
  int read_dtype;
  bool flat;
};

std::vector<Pair> pair_up(const TensorViews& written, const TensorViews& read) {
  std::vector<Pair> pairs;
  pairs.reserve(written.size());
  for (size_t i = 0; i < written.size(); ++i) {
    pairs.push_back({written[i].mutable_data<char>(), read[i].const_data<char>(),
                     bytes_per_element(written[i].dtype), bytes_per_element(read[i].dtype),
                     dtype_index(written[i].dtype), dtype_index(read[i].dtype),
                     is_flat_pair(written[i], read[i])});
  }
  return pairs;
}

void scale_accumulate(StableIValue* stack, uint64_t, uint64_t) {
  const ScaleAccumulateArguments arguments = read_scale_accumulate(stack);
  const std::vector<Chunk> chunks = cut(arguments.accumulators);
  const std::vector<Pair> pairs = pair_up(arguments.accumulators, arguments.gradients);
  const bool with_statistics = arguments.statistics.has_value();
  const bool streaming =
      arguments.first_write && count_bytes(arguments.accumulators) >= kStreamingBytes;
  const auto& table = kernels().accumulate;
  std::vector<ChunkStatistics> partials(with_statistics ? chunks.size() : 0);

  for_each_chunk(chunks, count_elements(arguments.accumulators), [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const Pair& pair = pairs[chunk.tensor];
    ChunkStatistics partial;
    if (pair.flat) {
      const AccumulateKernel kernel = table[pair.written_dtype][pair.read_dtype]
                                           [arguments.first_write][with_statistics][streaming];
      partial = kernel(pair.written + chunk.begin * pair.written_bytes,
                       pair.read + chunk.begin * pair.read_bytes, chunk.count, arguments.scale);
    } else {
      const TensorView& accumulator = arguments.accumulators[chunk.tensor];
      const TensorView& gradient = arguments.gradients[chunk.tensor];
      partial = with_accumulator_type(accumulator.dtype, [&]<typename accumulator_t>() {
        return with_gradient_type(gradient.dtype, [&]<typename gradient_t>() {
          const auto kernel = arguments.first_write
                                  ? accumulate_strided<true, accumulator_t, gradient_t>
                                  : accumulate_strided<false, accumulator_t, gradient_t>;
          return kernel(accumulator, gradient, chunk.begin, chunk.count, arguments.scale);
        });
      });
    }
    if (with_statistics) partials[i] = partial;
  });
  if (with_statistics) add_statistics(*arguments.statistics, partials);
}

void gradient_statistics(StableIValue* stack, uint64_t, uint64_t) {
  const GradientStatisticsArguments arguments = read_gradient_statistics(stack);
  const std::vector<Chunk> chunks = cut(arguments.gradients);
  std::vector<ChunkStatistics> partials(chunks.size());

  for_each_chunk(chunks, count_elements(arguments.gradients), [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const TensorView& gradient = arguments.gradients[chunk.tensor];
    if (is_dense(gradient)) {
      partials[i] = kernels().statistics[dtype_index(gradient.dtype)](
          gradient.const_data<char>() + chunk.begin * bytes_per_element(gradient.dtype),
          chunk.count);
    } else {
      partials[i] = with_gradient_type(gradient.dtype, [&]<typename gradient_t>() {
        return statistics_strided<gradient_t>(gradient, chunk.begin, chunk.count);
      });
    }
  });
  add_statistics(arguments.statistics, partials);
}

void finalise(StableIValue* stack, uint64_t, uint64_t) {
  const FinaliseArguments arguments = read_finalise(stack);
  const std::vector<Chunk> chunks = cut(arguments.outputs);
  const std::vector<Pair> pairs = pair_up(arguments.outputs, arguments.accumulators);
  double coefficient = *arguments.scale.const_data<double>();
  if (arguments.norm) {
    coefficient *= clip_coefficient(*arguments.norm->const_data<double>(), *arguments.max_norm);
  }

  for_each_chunk(chunks, count_elements(arguments.outputs), [&](int64_t i) {
    const Chunk& chunk = chunks[i];
    const Pair& pair = pairs[chunk.tensor];
    if (pair.flat) {
      kernels().finalise[pair.written_dtype][pair.read_dtype](
          pair.written + chunk.begin * pair.written_bytes,
          pair.read + chunk.begin * pair.read_bytes, chunk.count, coefficient);
    } else {
      const TensorView& output = arguments.outputs[chunk.tensor];
      const TensorView& accumulator = arguments.accumulators[chunk.tensor];
      with_gradient_type(output.dtype, [&]<typename output_t>() {
        with_accumulator_type(accumulator.dtype, [&]<typename accumulator_t>() {
          finalise_strided<output_t, accumulator_t>(output, accumulator, chunk.begin, chunk.count,
                                                    coefficient);
        });
      });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sbp_fast, CPU, library) {
  library.impl("scale_accumulate_", &scale_accumulate);
  library.impl("gradient_statistics_", &gradient_statistics);
  library.impl("finalise_", &finalise);
}

}  // namespace sbp_fast::cpu

extern "C" __attribute__((visibility("default"))) const char* sbp_fast_cpu_instruction_set() {
  return sbp_fast::cpu::kernels().instruction_set;
}
