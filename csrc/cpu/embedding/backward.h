// The embedding op's backwards, for ops whose lookups get more gradients.
#pragma once

#include <tuple>

#include "cpu/embedding/backward_args.h"

namespace rk {

// The rows of each table that were looked up, ascending; their gradients; those of the per-sample weights.
// `fm` has a part for each table, or is empty.
std::tuple<Tensors, Tensors, Tensors> sparse_gradients(const BackwardArgs& backward,
                                                       const std::vector<FmPart>& fm = {});
// An optimizer's step on the rows that were looked up -> the gradients of the per-sample weights. `idle`, of
// each table: exact Adam, whose rows first catch up. Gradients that depend on the tables' values are of rows
// as they are.
Tensors update_tables(const BackwardArgs& backward, const Tensors& weights, const Tensors& states,
                      int64_t optimizer, const std::vector<double>& hyper, const std::vector<FmPart>& fm = {},
                      const CatchUp* idle = nullptr);

}  // namespace rk
