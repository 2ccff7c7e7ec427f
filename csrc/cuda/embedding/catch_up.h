// Tables under exact Adam, from an op's lists.
#pragma once

#include "cuda/embedding/features.h"
#include "cuda/embedding/idle_steps.cuh"

namespace rk {
namespace cuda {

// Raises for lists that do not fit the tables; of each there are 2 states and a clock of 4 numbers.
std::vector<CatchUp> catch_ups(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                               const Tensors& histories, const std::vector<double>& clocks);

}  // namespace cuda
}  // namespace rk
