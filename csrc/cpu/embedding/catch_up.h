// Tables under exact Adam, from an op's lists.
#pragma once

#include <vector>

#include "cpu/embedding/params.h"
#include "stable/tensor.h"

namespace rk {

// Raises for lists that do not fit the tables; of each there are 2 states and a clock of 4 numbers.
std::vector<CatchUp> catch_ups(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                               const Tensors& histories, const std::vector<double>& clocks);

}  // namespace rk
