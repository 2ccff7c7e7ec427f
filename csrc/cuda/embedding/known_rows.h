// Ids that need not be rows of their table become rows, before anything reads them.
#pragma once

#include "cuda/embedding/features.h"

namespace rk {
namespace cuda {

// The ids of each feature as they are, or the rows that they look up, int64: one kernel is launched where
// features have ids that need not be rows, none where not.
Tensors find_rows(const FeatureArgs& args);

inline void use_rows(const FeatureArgs& args, size_t f, const Tensors& rows, Bags& bags) {
  if (args.known_of(f).unknown == Unknown::error) return;
  bags.ids = rows[f].const_data_ptr();
  bags.wide_ids = true;
}

}  // namespace cuda
}  // namespace rk
