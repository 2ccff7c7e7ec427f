// Optimizers' steps on tables: their arguments, checked, and the launches of a fused one.
#pragma once

#include "cuda/embedding/backward.h"
#include "cuda/embedding/optimizer.cuh"
#include "embedding/backward.h"
#include "embedding/optimizer.h"

namespace rk {
namespace cuda {

// Raises unless the table and its states are what the optimizer steps on.
Update make_cuda_update(const char* op, int64_t optimizer, const double* hyper, const Tensor& weight,
                        const Tensor* states);

// Calls launch(T*, device, batch, gradients, lanes) for the tables of dtype T, as many at a time as go with a
// launch. `U`: Update, or what derives from it.
template <class U, class Launch>
void launch_updates(const Device& device, ScalarType dtype, const std::vector<U>& updates,
                    const Gradients& gradients, const Launch& launch) {
  dispatch_floating(dtype, [&](auto* type) {
    constexpr int kElements = kPack<std::remove_pointer_t<decltype(type)>>;
    Batch<U> batch;
    int64_t pieces = 1;
    const auto run = [&] {
      launch(type, device, batch, gradients, log2_lanes(pieces));
      batch.n = 0;
    };
    for (const U& u : updates) {
      if (u.R == 0 || u.D == 0) continue;
      if (batch.n == Batch<U>::kItems) run();
      batch.items[batch.n++] = u;
      pieces = std::max<int64_t>(pieces, u.packed ? u.D / kElements : u.D);
    }
    if (batch.n) run();
  });
}

// The step in the backward -> the gradients of the per-sample weights. Does not wait for the device.
// `prepare` is called before the first launch of the step, when there is nothing left to raise.
template <class U, class Launch, class Prepare = void (*)()>
Tensors step_on_gradients(
    const FeatureArgs& args, const OptionalTensors& grad_outs, const Tensors& weights, std::vector<U> updates,
    const Launch& launch, const Prepare& prepare = [] {}) {
  int64_t first_key = 0;
  for (U& u : updates) {
    u.first_key = first_key;
    first_key += u.R;
  }
  check_apart(weights);
  auto [runs, grad_per_sample_weights] = run_gradients(args, grad_outs, weights, rows_of(weights));
  prepare();
  const Device device(weights[0]);
  for (const Tensor& values : runs.values) {
    std::vector<U> of_dtype;
    for (size_t t = 0; t < weights.size(); ++t)
      if (weights[t].scalar_type() == values.scalar_type()) of_dtype.push_back(updates[t]);
    const Gradients gradients{runs.keys.const_data_ptr(), runs.keys.scalar_type() == ScalarType::Long,
                              values.const_data_ptr(), runs.n, values.size(1)};
    launch_updates(device, values.scalar_type(), of_dtype, gradients, launch);
  }
  return std::move(grad_per_sample_weights);
}

}  // namespace cuda
}  // namespace rk
