// The arguments of a backward of lookups, checked.
#pragma once

#include "cpu/embedding/features.h"
#include "embedding/backward.h"

namespace rk {

// The arguments of a backward, checked; `bags` have the gradients of the outputs as `out`.
struct BackwardArgs {
  FeatureArgs args;
  Features features;
  Ints rows;  // of each table
  OutGrads outs;
  Tensors grads;   // of each feature's output, rows of unit stride
  Tensors tables;  // rows of unit stride; empty if their values are not needed

  BackwardArgs(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
               const FeatureArgs& args);
  // The gradients of the per-sample weights.
  Tensors factor_grads() const;
};

// Fills with zeros, non-temporally if they are many: std::memset reads what it is to overwrite, and takes
// twice as long.
void zero(const Tensors& tensors);

}  // namespace rk
