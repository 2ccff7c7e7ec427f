// One step of an optimizer on the rows of tables that a batch looked up, given each row's gradient g.
//
//   sgd               w -= lr g
//   adagrad           s += g^2                    w -= lr g / (sqrt s + eps)
//   row-wise adagrad  s += mean_d g_d^2           w -= lr g / (sqrt s + eps), one s a row
//   adam              m += (1 - beta1) (g - m)    v += (1 - beta2) (g^2 - v)
//                     w -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt v + eps)
//   adamw             the same m and v
//                     w -= lr / (1 - beta1^t) m / (sqrt v / sqrt(1 - beta2^t) + eps)
//
// where g is grad_factor times the gradient (1 over the loss scale of mixed precision), shortened to max_norm
// where its norm over the row is more and max_norm is not 0; with g + weight_decay w for g, but in adamw
// first w -= lr weight_decay w. The host folds the factors that depend on t alone into `step` and
// `inverse_root`: w -= step m / (inverse_root sqrt v + eps).
//
// State is float, double for double tables. Bytes a row: g, w read and written, and each state read and
// written. A group of lanes takes a row.
#pragma once

#include "cuda/common/device.cuh"
#include "embedding/params.h"

namespace rk {
namespace cuda {

// A table and its step. Its row r has the key first_key + r.
struct Update {
  void* weight;  // [R, D], rows stride_wr apart
  int64_t stride_wr, R, first_key;
  void* state[2];  // [R, D], rows stride_sr apart, or [R]; or null
  int64_t stride_sr;
  double lr, beta1, beta2, eps, weight_decay, step, inverse_root, grad_factor, max_norm;
  int32_t D;
  bool packed;  // rows of the table, of the state and of the gradient are packs
};

// The gradients: of the row with key keys[i], values[i]. `count` of them, on the device, or n if that is
// null.
struct Gradients {
  const int64_t* keys;
  const void* values;  // [n, .], rows `stride` apart
  const int64_t* count;
  int64_t n, stride;
};

// The norm of factor * grad where the squares are beyond the range, or so small that they lose digits.
template <class A, class T>
__device__ A scaled_norm(const Update& u, const T* grad, A factor, Group group) {
  A most = 0;
  for (int d = 0; d < u.D; ++d) {
    const A g = fabs(factor * widen(grad[d]));
    if (g != g) return g;
    most = g > most ? g : most;
  }
  if (most == 0 || most - most != 0) return most;
  A squares = 0;
  for (int d = group.lane(); d < u.D; d += group.lanes()) {
    const A g = factor * widen(grad[d]) / most;
    squares += g * g;
  }
  return most * sqrt(group.sum(squares));
}

template <class T, int n>
__device__ void update_row(const Update& u, Optimizer optimizer, int64_t row, const T* grad, Group group) {
  using A = accumulate_t<T>;
  T* weight = static_cast<T*>(u.weight) + row * u.stride_wr;
  A* states[2];
  for (int i = 0; i < 2; ++i)
    states[i] = u.state[i] ? static_cast<A*>(u.state[i]) + row * u.stride_sr : nullptr;
  const A lr = A(u.lr), eps = A(u.eps), decay = optimizer == kAdamW ? A(0) : A(u.weight_decay);
  const A shrink = optimizer == kAdamW ? A(1 - u.lr * u.weight_decay) : A(1);

  A factor = A(u.grad_factor);
  if (u.max_norm != 0) {
    A squares = 0;
    for (int d = group.lane(); d < u.D; d += group.lanes()) {
      const A g = factor * widen(grad[d]);
      squares += g * g;
    }
    A norm = sqrt(group.sum(squares));
    const bool narrow = sizeof(A) == 4;
    if (!(norm >= A(narrow ? 1e-15 : 1e-130) && norm <= A(narrow ? 1e18 : 1e150)))
      norm = scaled_norm<A>(u, grad, factor, group);
    if (!(norm <= A(u.max_norm))) factor *= A(u.max_norm) / norm;  // a NaN takes its row along
  }
  A row_scale = lr;  // sgd's and row-wise adagrad's
  if (optimizer == kRowWiseAdagrad) {
    A squares = 0;
    for (int d = group.lane(); d < u.D; d += group.lanes()) {
      const A g = factor * widen(grad[d]) + decay * widen(weight[d]);
      squares += g * g;
    }
    A* sum = static_cast<A*>(u.state[0]) + row;
    const A s = *sum + group.sum(squares) / A(u.D);
    if (group.lane() == 0) *sum = s;
    row_scale = lr / (sqrt(s) + eps);
  }
  for (int d = group.lane() * n; d < u.D; d += group.lanes() * n) {
    const Pack<T, n> grads = load<n>(grad + d), weights = load<n>(weight + d);
    A w[n], g[n];
    RK_UNROLL
    for (int i = 0; i < n; ++i) {
      w[i] = shrink * widen(weights.x[i]);
      g[i] = factor * widen(grads.x[i]) + decay * w[i];
    }
    if (optimizer == kSGD || optimizer == kRowWiseAdagrad) {
      RK_UNROLL
      for (int i = 0; i < n; ++i) w[i] -= row_scale * g[i];
    } else if (optimizer == kAdagrad) {
      Pack<A, n> s = load<n>(states[0] + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        s.x[i] += g[i] * g[i];
        w[i] -= lr * g[i] / (sqrt(s.x[i]) + eps);
      }
      store<n>(states[0] + d, s.x);
    } else {
      Pack<A, n> m = load<n>(states[0] + d), v = load<n>(states[1] + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        m.x[i] += A(1 - u.beta1) * (g[i] - m.x[i]);
        v.x[i] += A(1 - u.beta2) * (g[i] * g[i] - v.x[i]);
        w[i] -= A(u.step) * m.x[i] / (A(u.inverse_root) * sqrt(v.x[i]) + eps);
      }
      store<n>(states[0] + d, m.x);
      store<n>(states[1] + d, v.x);
    }
    store<n>(weight + d, w);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_update(const Batch<Update> batch, const Gradients gradients, Optimizer optimizer,
                     int log2_lanes) {
  const Group group{log2_lanes};
  const int64_t i = int64_t(blockIdx.x) * group.per_block() + group.index();
  if (i >= (gradients.count ? *gradients.count : gradients.n)) return;
  const int64_t key = gradients.keys[i];
  const Update& u = batch.items[find(batch, &Update::first_key, key)];
  const int64_t row = key - u.first_key;
  if (row < 0 || row >= u.R) return;
  const T* grad = static_cast<const T*>(gradients.values) + i * gradients.stride;
  if (u.packed)
    update_row<T, kPack<T>>(u, optimizer, row, grad, group);
  else
    update_row<T, 1>(u, optimizer, row, grad, group);
}

}  // namespace cuda
}  // namespace rk
