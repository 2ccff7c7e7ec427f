// The embedding op's forward: its arguments, checked, and the lookups of any part of a batch.
#pragma once

#include "cpu/embedding/features.h"

namespace rk {

struct ForwardArgs {
  FeatureArgs args;
  Features features;
  Tensors tables;  // rows of unit stride
  // [B, sum of the widths + extra_columns] with concat, else one tensor a feature.
  Tensors outs;

  ForwardArgs(const Tensors& weights, const FeatureArgs& args, bool concat, int64_t extra_columns = 0);
  ScalarType dtype(size_t f) const { return tables[args.tables[f]].scalar_type(); }
  // Writes bags [b0, b1) of feature f, or does nothing and returns false: an id is outside its table.
  bool look_up(size_t f, int64_t b0, int64_t b1) const;
  // Raises for the first id outside its table.
  void check_range() const;
};

}  // namespace rk
