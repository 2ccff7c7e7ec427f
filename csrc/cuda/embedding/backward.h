// What an optimizer's step takes from the embedding op's backward.
#pragma once

#include <utility>

#include "cuda/embedding/features.h"

namespace rk {
namespace cuda {

// The gradient of every row that was looked up: where the sorted keys have another than before, that of the
// row with this key, the rows numbered over all tables. The last key is nobody's.
struct RunGradients {
  int64_t n = 0;   // lookups
  Tensor keys;     // int32 or int64
  Tensors values;  // [n, .], for each dtype of a table that has a gradient
};

// They, and the gradients of the per-sample weights. Does not wait for the device.
std::pair<RunGradients, Tensors> run_gradients(const FeatureArgs& args, const OptionalTensors& grad_outs,
                                               const Tensors& weights, const Ints& rows);

}  // namespace cuda
}  // namespace rk
