// What the schemas give by number, for the kernels of both devices.
#pragma once

#include <stdint.h>

namespace rk {

// ops/embedding_bag.py: MODES
enum EmbeddingMode : uint8_t { kNone = 0, kSum = 1, kMean = 2, kMax = 3 };

// ops/embedding_bag_update.py: OPTIMIZERS
enum Optimizer : int64_t {
  kSGD = 0,
  kAdagrad = 1,
  kRowWiseAdagrad = 2,
  kAdam = 3,
  kAdamW = 4,
  kFTRL = 5,
  kRowWiseAdam = 6,
  kRowWiseRMSprop = 7
};

// What an optimizer keeps of a table, tensors [R, D] before those [R], and how many settings it has of its
// own, which follow those that all have (ops/embedding_bag_update.py: RULES).
struct Rule {
  int elementwise, row_wise, settings;
};
constexpr Rule kRules[] = {{0, 0, 0}, {1, 0, 0}, {0, 1, 0}, {2, 0, 0},
                           {2, 0, 0}, {2, 0, 4}, {1, 1, 0}, {0, 2, 2}};

}  // namespace rk
