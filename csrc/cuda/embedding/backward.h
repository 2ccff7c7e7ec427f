// What an optimizer's step takes from the embedding op's backward.
#pragma once

#include <utility>

#include "cuda/embedding/features.h"

namespace rk {
namespace cuda {

// The gradient of every row that was looked up. Run i, from 0, is of the row with key keys[i], the rows
// numbered over all tables; how many runs there are is the last of `ranks`, on the device.
struct RunGradients {
  int64_t n = 0;  // lookups: no more runs than that
  Tensor keys, ranks;
  Tensors values;  // [n, .], for each dtype of a table that has a gradient
};

// They, and the gradients of the per-sample weights. Does not wait for the device.
std::pair<RunGradients, Tensors> run_gradients(const FeatureArgs& args, const OptionalTensors& grad_outs,
                                               const Tensors& weights, const Ints& rows);

}  // namespace cuda
}  // namespace rk
