// What of an optimizer's step the host folds (fold_settings of embedding/optimizer.h), on the device: where
// the learning rate, the number of the step and the loss scale are there, and whether the gradients are
// finite.
//
// A thread a table, some 50 bytes read and as many written.
#pragma once

#include "cuda/embedding/optimizer.cuh"

namespace rk {
namespace cuda {

// A table's part of it on the device: `count` steps were taken, and one more is unless *skip is not 0.
struct Live {
  float* count;
  const float *lr, *scale, *skip;
  Now* now;  // where it is folded
  double beta1, beta2;
};

// Counts the step, and folds.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_fold(const Batch<Live> batch, Optimizer optimizer) {
  const int i = int(blockIdx.x) * kThreads + int(threadIdx.x);
  if (i >= batch.n) return;
  const Live& live = batch.items[i];
  Now now{*live.lr, *live.lr, 1, 1 / double(*live.scale), *live.count + 1.0, *live.skip != 0};
  if (!now.skips) *live.count = float(now.count);
  if (optimizer == kAdam || optimizer == kAdamW || optimizer == kRowWiseAdam) {
    const double correction1 = 1 - pow(live.beta1, now.count), root2 = sqrt(1 - pow(live.beta2, now.count));
    now.step = optimizer == kAdam ? now.lr * root2 / correction1 : now.lr / correction1;
    now.inverse_root = optimizer == kAdam ? 1 : 1 / root2;
  }
  *live.now = now;
}

}  // namespace cuda
}  // namespace rk
