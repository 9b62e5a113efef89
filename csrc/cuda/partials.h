// The statistics of one call: room for every chunk's share, and the launch that adds them up.
#pragma once

#include "call.h"
#include "statistics.cuh"

namespace sbp_fast::cuda {

// Room for one Partial per chunk, and their sum. Without statistics it holds nothing.
class Partials {
 public:
  Partials(const Device& device, const Plan& plan, const TensorView* statistics)
      : device_(device), count_(plan.chunks()), statistics_(statistics) {
    if (statistics_ == nullptr) return;
    memory_.emplace(device.empty(count_ * static_cast<int64_t>(sizeof(Partial))));
    partials_ = static_cast<Partial*>(memory_->mutable_data_ptr());
  }

  // Where a launch's blocks leave theirs: flat chunks come first, then the strided ones.
  Partial* of_flat(const Launch& launch) const { return at(launch.first); }
  Partial* of_strided(const Plan& plan, const Launch& launch) const {
    return at(static_cast<int64_t>(plan.flat_chunks.size()) + launch.first);
  }

  void add_up() const {
    if (statistics_ == nullptr) return;
    device_.launch("add_partials", add_partials, 1, static_cast<const Partial*>(partials_), count_,
                   statistics_->mutable_data<double>());
  }

 private:
  Partial* at(int64_t chunk) const { return partials_ == nullptr ? nullptr : partials_ + chunk; }

  const Device& device_;
  int64_t count_;
  const TensorView* statistics_;
  std::optional<torch::stable::Tensor> memory_;
  Partial* partials_ = nullptr;
};

}  // namespace sbp_fast::cuda
