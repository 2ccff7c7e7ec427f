// What the schemas give by number, for the kernels of both devices.
#pragma once

#include <stdint.h>

namespace rk {

// ops/embedding_bag.py: MODES
enum EmbeddingMode : uint8_t { kNone = 0, kSum = 1, kMean = 2, kMax = 3 };

// ops/embedding_bag_update.py: OPTIMIZERS
enum Optimizer : int64_t { kSGD = 0, kAdagrad = 1, kRowWiseAdagrad = 2, kAdam = 3, kAdamW = 4 };

}  // namespace rk
