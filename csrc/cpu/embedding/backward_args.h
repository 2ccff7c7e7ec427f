// The arguments of a backward of lookups, checked.
#pragma once

#include "cpu/embedding/features.h"

namespace rk {

inline Ints rows_of(const Tensors& weights) {
  Ints rows;
  for (size_t t = 0; t < weights.size(); ++t) {
    check_table("embedding_bag_update", weights[t], t);
    rows.push_back(weights[t].size(0));
  }
  return rows;
}

// The arguments of a backward, checked; `bags` have the gradients of the outputs as `out`.
struct BackwardArgs {
  FeatureArgs args;
  Features features;
  Tensors grads;                       // of each feature's output, rows of unit stride
  Tensors tables;                      // rows of unit stride; empty if their values are not needed
  Ints rows, widths;                   // of each table
  std::vector<const Tensor*> grad_of;  // a gradient with the dtype of the table, null for one without
  const Tensor& some_grad;             // a gradient

  BackwardArgs(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
               const FeatureArgs& args);
  // The gradients of the per-sample weights.
  Tensors factor_grads() const;
};

// Fills with zeros, non-temporally if they are many: std::memset reads what it is to overwrite, and takes
// twice as long.
void zero(const Tensors& tensors);

}  // namespace rk
