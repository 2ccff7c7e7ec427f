// The optimizers of the embedding ops by their number in the schema (ops/embedding_bag_update.py:
// OPTIMIZERS).
#pragma once

#include <stdint.h>

namespace rk {

enum Optimizer : int64_t { kSGD = 0, kAdagrad = 1, kRowWiseAdagrad = 2, kAdam = 3, kAdamW = 4 };

}  // namespace rk
