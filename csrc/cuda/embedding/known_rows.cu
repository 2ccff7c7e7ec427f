// Allocations and launches; the kernel is in known_rows.cuh.
#include <torch/csrc/stable/ops.h>

#include "cuda/embedding/known_rows.cuh"
#include "cuda/embedding/known_rows.h"

namespace rk {
namespace cuda {

Tensors find_rows(const FeatureArgs& args) {
  Tensors rows = args.indices;
  if (args.known.empty()) return rows;
  const Device device(args.indices[0]);
  const auto launch = [&](const Batch<KnownIds>& batch, int64_t blocks) {
    device.launch(known_rows, blocks, 0, batch);
  };
  Batches<KnownIds, decltype(launch)> batches(launch);
  Tensors kept;
  for (size_t f = 0; f < args.size(); ++f) {
    const Known known = args.known_of(f);
    if (known.unknown == Unknown::error || !on_device_of(args.indices[f], args.indices[0])) continue;
    kept.push_back(torch::stable::contiguous(args.indices[f]));
    const int64_t n = kept.back().numel();
    rows[f] = torch::stable::new_empty(kept.back(), kept.back().sizes(), ScalarType::Long);
    batches.add({known, kept.back().const_data_ptr(), static_cast<int64_t*>(rows[f].mutable_data_ptr()), n, 0,
                 args.indices[f].scalar_type() == ScalarType::Long},
                (n + kThreads * kIds - 1) / (kThreads * kIds));
  }
  batches.flush();
  return rows;
}

}  // namespace cuda
}  // namespace rk
