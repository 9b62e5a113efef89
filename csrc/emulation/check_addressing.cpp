// Tensors of 2^31 elements and more, without the memory: the tables that such tensors are cut into,
// and the kernels themselves on address space of which only the pages they touch become memory.
#include <sys/mman.h>

#include "../cuda/accumulate.cuh"
#include "../cuda/batch_norm.cuh"
#include "cases.h"

namespace sbp_fast::check {
namespace {

constexpr int64_t kHuge = int64_t{1} << 31;

void check_tiling() {
  const std::vector<int64_t> sizes = {kHuge + 5, 3, 0, 4 * kHuge + 1};
  // Any addresses will do: nothing is read or written.
  const uintptr_t written = uintptr_t{1} << 44;
  const uintptr_t read = uintptr_t{1} << 45;
  const uintptr_t between = uintptr_t{1} << 37;
  std::vector<cuda::Pair> pairs;
  for (size_t i = 0; i < sizes.size(); ++i) {
    pairs.push_back({reinterpret_cast<void*>(written + i * between),
                     reinterpret_cast<const void*>(read + i * between), ScalarType::Float,
                     ScalarType::BFloat16, sizes[i], true, 0, nullptr, nullptr, nullptr});
  }
  const cuda::Plan plan = cuda::make_plan(pairs);
  size_t position = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int64_t begin = 0; begin < sizes[i];) {
      if (position == plan.flat_chunks.size()) fail("tiling: a tensor is not covered");
      const cuda::FlatChunk& chunk = plan.flat_chunks[position++];
      if (reinterpret_cast<uintptr_t>(chunk.written) != written + i * between + begin * 4 ||
          reinterpret_cast<uintptr_t>(chunk.read) != read + i * between + begin * 2 ||
          chunk.count < 1 || chunk.count > cuda::kChunkElements) {
        fail("tiling: chunk %zu does not begin where the one before it ended", position - 1);
      }
      begin += chunk.count;
      if (begin > sizes[i]) fail("tiling: chunk %zu ends beyond its tensor", position - 1);
    }
  }
  if (position != plan.flat_chunks.size()) fail("tiling: more chunks than elements");
  if (plan.flat_launches.size() != 1 ||
      plan.flat_launches[0].count != static_cast<int64_t>(position)) {
    fail("tiling: tensors of equal dtypes must share one launch");
  }
}

void check_locate() {
  // Three rows of 2^31 + 1 elements; the tensor that is read has its rows interleaved.
  const std::vector<int64_t> sizes = {3, kHuge + 1};
  const std::vector<int64_t> written_strides = {kHuge + 8, 1};
  const std::vector<int64_t> read_strides = {1, 3};
  const cuda::Pair pair{
      nullptr, nullptr, ScalarType::Float, ScalarType::Float,      3 * (kHuge + 1),
      false,   2,       sizes.data(),      written_strides.data(), read_strides.data()};
  const cuda::StridedPair merged = cuda::merge_dimensions(pair);
  for (const int64_t row : {0, 1, 2}) {
    for (const int64_t column : {int64_t{0}, int64_t{77}, kHuge}) {
      const cuda::Location location = cuda::locate(merged, row * (kHuge + 1) + column);
      if (location.written != row * (kHuge + 8) + column || location.read != row + 3 * column) {
        fail("locate: wrong at row %d", static_cast<int>(row));
      }
    }
  }
}

// Address space for `count` elements, all zero; pages become memory when they are written.
template <typename T>
class Sparse {
 public:
  explicit Sparse(int64_t count) : bytes_(count * sizeof(T)) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory_ == MAP_FAILED) fail("addressing: no %zu bytes of address space", bytes_);
  }
  ~Sparse() { munmap(memory_, bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  T* data() const { return static_cast<T*>(memory_); }

 private:
  size_t bytes_;
  void* memory_;
};

void check_flat_end() {
  const int64_t count = kHuge + 5;
  const Sparse<float> accumulator(count);
  const Sparse<float> gradient(count);
  gradient.data()[count - 1] = 3.0f;
  gradient.data()[kHuge - 1] = 5.0f;
  const cuda::Plan plan =
      cuda::make_plan({{accumulator.data(), gradient.data(), ScalarType::Float, ScalarType::Float,
                        count, true, 0, nullptr, nullptr, nullptr}});
  const int64_t last = static_cast<int64_t>(plan.flat_chunks.size()) - 2;
  emulation::launch(cuda::accumulate_flat<float, float, false, false>, 2, kThreads,
                    plan.flat_chunks.data() + last, 2.0, static_cast<cuda::Partial*>(nullptr));
  check_close("2^31 elements, flat", count - 1, accumulator.data()[count - 1], 6.0, 0.0);
  check_close("2^31 elements, flat", kHuge - 1, accumulator.data()[kHuge - 1], 10.0, 0.0);
}

void check_strided_far() {
  const std::vector<int64_t> sizes = {3, 5};
  const std::vector<int64_t> written_strides = {kHuge + 7, 1};
  const std::vector<int64_t> read_strides = {1, kHuge / 2 + 9};
  const Sparse<float> accumulator(2 * (kHuge + 7) + 5);
  const Sparse<float> gradient(4 * (kHuge / 2 + 9) + 3);
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < 5; ++column) {
      gradient.data()[row + column * read_strides[1]] = static_cast<float>(10 * row + column);
    }
  }
  const cuda::Plan plan =
      cuda::make_plan({{accumulator.data(), gradient.data(), ScalarType::Float, ScalarType::Float,
                        15, false, 2, sizes.data(), written_strides.data(), read_strides.data()}});
  emulation::launch(cuda::accumulate_strided<float, float>, 1, kThreads, plan.strided_pairs.data(),
                    plan.strided_chunks.data(), 2.0, false, static_cast<cuda::Partial*>(nullptr));
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < 5; ++column) {
      check_close("strides of 2^31", row, accumulator.data()[row * written_strides[0] + column],
                  2.0 * static_cast<double>(10 * row + column), 0.0);
    }
  }
}

// Every vector of every channel lies in exactly one chunk.
template <bool kPlanes>
void check_cut(int64_t outer, int64_t channels, int64_t inner) {
  const cuda::ChannelCut cut = cuda::cut_channels(outer, channels, inner, 1, 256, 4);
  if (cut.planes != kPlanes) fail("cut: channels lie elsewhere");
  if (cut.blocks() >= 2 * cuda::kWantedBlocks + channels) fail("cut: more blocks than wanted");
  threadIdx.x = 0;
  blockDim.x = 256;
  int64_t line = 0;
  int64_t vector = 0;
  for (int64_t chunk = 0; chunk < cut.chunks * (kPlanes ? 1 : cut.across); ++chunk) {
    blockIdx.x = static_cast<unsigned>(chunk * (kPlanes ? cut.channels : 1));
    const cuda::Place<kPlanes, 1> place(cut);
    if (place.line != line || place.vector != vector) fail("cut: a gap, or a part twice");
    vector += cut.chunk_vectors;
    if (vector >= cut.vectors) {
      vector = 0;
      line += cut.chunk_lines;
    }
  }
  if (line < cut.lines || vector != 0) fail("cut: not all is covered");
}

// Two lines that begin 2^31 + 8 elements apart; the first block has parts of both.
template <bool kPlanes>
void check_lines_far() {
  const int64_t pitch = kHuge + 8;
  const int64_t channels = kPlanes ? pitch / 8 : pitch;
  const Sparse<BFloat16> input(2 * pitch);
  const Sparse<BFloat16> output(2 * pitch);
  const Sparse<double> coefficients(3 * channels);
  const cuda::ChannelCut cut = cuda::cut_channels(2, channels, kPlanes ? 8 : 1, 8, kThreads, 4);
  for (const int64_t element : {int64_t{3}, pitch + 3}) {
    input.data()[element] = static_cast<BFloat16>(element > pitch ? 5.0f : 7.0f);
  }
  const int64_t channel = kPlanes ? 0 : 3;
  for (const int row : {0, 1, 2}) coefficients.data()[row * channels + channel] = row + 2.0;
  emulation::launch(cuda::batch_norm_normalise<kPlanes, 8, BFloat16>, 1, kThreads, input.data(),
                    static_cast<const double*>(coefficients.data()), cut, output.data());
  const auto at = [&](int64_t element) { return static_cast<double>(output.data()[element]); };
  check_close("lines of 2^31 elements", 3, at(3), (7.0 - 2.0) * 3.0 + 4.0, 0.0);
  check_close("lines of 2^31 elements", pitch + 3, at(pitch + 3), (5.0 - 2.0) * 3.0 + 4.0, 0.0);
}

}  // namespace
}  // namespace sbp_fast::check

int main() {
  using namespace sbp_fast::check;
  check_tiling();
  check_locate();
  check_flat_end();
  check_strided_far();
  check_cut<true>(3, 5, 49);
  check_cut<true>(1, 3, 4 * kHuge + 1);
  check_cut<true>(kHuge + 1, 2, 3);
  check_cut<true>(1000, 64, 12544);
  check_cut<false>(kHuge + 1, 3, 1);
  check_cut<false>(70, 1000, 1);
  check_cut<false>(9, 2049, 1);
  check_lines_far<true>();
  check_lines_far<false>();
}
