// One step of an optimizer on the rows of tables that a batch looked up, given each row's gradient g.
//
//   sgd               w -= lr g
//   adagrad           s += g^2                    w -= lr g / (sqrt s + eps)
//   row-wise adagrad  s += mean_d g_d^2           w -= lr g / (sqrt s + eps), one s a row
//   adam              m += (1 - beta1) (g - m)    v += (1 - beta2) (g^2 - v)
//                     w -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt v + eps)
//   adamw             the same m and v
//                     w -= lr / (1 - beta1^t) m / (sqrt v / sqrt(1 - beta2^t) + eps)
//   row-wise adam     adamw with v += (1 - beta2) (mean_d g_d^2 - v), one v a row
//   ftrl              z += g - ((n + g^2)^p - n^p) / lr w,  n += g^2,  p = -lr_power
//                     w = |z| <= l1 ? 0 : (sign(z) l1 - z) / ((beta + n^p) / lr + l2)
//   row-wise rmsprop  v += (1 - beta2) (mean_d g_d^2 - v),  w -= min(lr ar_alpha (t - u), most) w,  u = t
//                     w -= lr g / (sqrt v + eps),  one v and one step u that touched it last a row
//
// where g is grad_factor times the gradient (1 over the loss scale of mixed precision), shortened to max_norm
// where its norm over the row is more and max_norm is not 0; in sgd, adam and the adagrads with g +
// weight_decay w for g, in adamw and row-wise adam first w -= lr weight_decay w. The factors that depend on t
// alone are folded into `step` and `inverse_root`: w -= step m / (inverse_root sqrt v + eps). The host folds
// them, or where lr, t and the loss scale are on the device, a launch before the step (fold.cuh).
//
// A table of 16 bits is rounded to the nearest, or stochastically by a kernel of its own: rounding.cuh.
//
// State is float, double for double tables. Bytes a row: g, w read and written, and each state read and
// written. A group of lanes takes a row.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/embedding/rounding.cuh"
#include "embedding/params.h"

namespace rk {
namespace cuda {

// A table and its step. Its row r has the key first_key + r.
struct Update {
  void* weight;  // [R, D], rows stride_wr apart
  int64_t stride_wr, R, first_key;
  void* state[2];  // as the rule has them: [R, D], rows stride_sr apart, or [R]; or null
  int64_t stride_sr;
  double lr, beta1, beta2, eps, weight_decay, step, inverse_root, grad_factor, max_norm;
  double own[2];  // FTRL: -lr_power, l1; row-wise RMSprop: the most that a row decays, number of the step
  int32_t D;
  bool packed;      // rows of the table, of the state and of the gradient are packs
  uint16_t number;  // which table it is
};

// Of a call with 16-bit tables that are rounded stochastically. It is larger: fewer tables go with a launch.
struct RoundedUpdate : Update {
  uint64_t rounding;  // Philox's key, or 0: to the nearest
  uint32_t count;     // number of the step
};

// What of an update changes from step to step.
struct Now {
  double lr, step, inverse_root, grad_factor, count;
  bool skips;  // gradients are not finite
};

// As the host has folded it.
__device__ inline Now now_of(const Update& u) {
  return {u.lr, u.step, u.inverse_root, u.grad_factor, u.own[1], false};
}
__device__ inline Now now_of(const RoundedUpdate& u) {
  return {u.lr, u.step, u.inverse_root, u.grad_factor, double(u.count), false};
}

// The gradients: of the row with key(i), values[i], wherever it is another key than before.
struct Gradients {
  const void* keys;    // sorted
  bool wide;           // they are int64, not int32
  const void* values;  // [n, .], rows `stride` apart
  int64_t n, stride;

  __device__ int64_t key(int64_t i) const { return read_int(keys, wide, i); }
  __device__ bool starts_run(int64_t i) const { return i == 0 || key(i - 1) != key(i); }
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

// grad_factor, less where the gradient is longer than max_norm.
template <class A, class T>
__device__ A clipped_factor(const Update& u, const Now& now, const T* grad, Group group) {
  const A factor = A(now.grad_factor);
  if (u.max_norm == 0) return factor;
  A squares = 0;
  for (int d = group.lane(); d < u.D; d += group.lanes()) {
    const A g = factor * widen(grad[d]);
    squares += g * g;
  }
  A norm = sqrt(group.sum(squares));
  const bool narrow = sizeof(A) == 4;
  if (!(norm >= A(narrow ? 1e-15 : 1e-130) && norm <= A(narrow ? 1e18 : 1e150)))
    norm = scaled_norm<A>(u, grad, factor, group);
  return norm <= A(u.max_norm) ? factor : factor * (A(u.max_norm) / norm);  // a NaN takes its row along
}

// What the columns of a row share: w = keep w, then w -= scale g, or scale m.
template <class A>
struct RowStep {
  A scale, keep;
};

// The part of a step that has one number a row.
template <class A, class T>
__device__ RowStep<A> step_on_row(const Update& u, const Now& now, Optimizer optimizer, int64_t row,
                                  const T* weight, const T* grad, A factor, Group group) {
  RowStep<A> step{A(now.lr), A(1)};
  if (optimizer == kAdamW || optimizer == kRowWiseAdam) step.keep = A(1 - now.lr * u.weight_decay);
  if (optimizer != kRowWiseAdagrad && optimizer != kRowWiseAdam && optimizer != kRowWiseRMSprop) return step;
  A* const state = static_cast<A*>(u.state[optimizer == kRowWiseAdam]) + row;
  A* const last = optimizer == kRowWiseRMSprop ? static_cast<A*>(u.state[1]) + row : nullptr;
  // Read by all lanes before the first one writes.
  const A before = *state, last_step = last ? *last : A(0);
  order_lanes(group.mask());
  const A decay = optimizer == kRowWiseAdagrad ? A(u.weight_decay) : A(0);
  A squares = 0;
  for (int d = group.lane(); d < u.D; d += group.lanes()) {
    const A g = factor * widen(grad[d]) + decay * widen(weight[d]);
    squares += g * g;
  }
  const A mean = group.sum(squares) / A(u.D);
  const A s = optimizer == kRowWiseAdagrad ? before + mean : before + A(1 - u.beta2) * (mean - before);
  if (group.lane() == 0) *state = s;
  step.scale = A(now.step) / (A(now.inverse_root) * sqrt(s) + A(u.eps));
  if (last) {
    const A shrink = A(now.lr) * A(u.weight_decay) * (last_step == 0 ? A(1) : A(now.count) - last_step);
    step.keep = A(1) - (shrink > A(u.own[0]) ? A(u.own[0]) : shrink);
    if (group.lane() == 0) *last = A(now.count);
  }
  return step;
}

// n^power; the root, which nearly all ask for, without pow.
template <class A>
__device__ A power_of(A x, A power) {
  return power == A(.5) ? sqrt(x) : pow(x, power);
}

// The new w; z and n are changed. A NaN stays.
template <class A>
__device__ A ftrl(const Update& u, A lr, A w, A g, A& z, A& n) {
  const A power = A(u.own[0]), l1 = A(u.own[1]);
  const A before = power_of(n, power);
  n += g * g;
  const A after = power_of(n, power);
  z += g - (after - before) / lr * w;
  const A magnitude = z > 0 ? z : -z;
  return magnitude <= l1 ? A(0) : (z > 0 ? l1 - z : -l1 - z) / ((A(u.eps) + after) / lr + A(u.weight_decay));
}

// Adam's and AdamW's columns, once the row has decayed.
template <class A>
__device__ void adam(const Update& u, const Now& now, A& w, A g, A& m, A& v) {
  m += A(1 - u.beta1) * (g - m);
  v += A(1 - u.beta2) * (g * g - v);
  w -= A(now.step) * m / (A(now.inverse_root) * sqrt(v) + A(u.eps));
}

// Columns [d, d + n) of a row, before they are stored.
template <class T, class A, int n>
__device__ void round_row(const Update&, const Now&, int64_t, int, A (&)[n]) {}
template <class T, class A, int n>
__device__ void round_row(const RoundedUpdate& u, const Now& now, int64_t row, int d, A (&w)[n]) {
  if constexpr (sizeof(T) == 2)
    if (u.rounding) round_columns<T>(w, u.rounding, uint32_t(now.count), row, d);
}

// `U`: Update or RoundedUpdate.
template <class T, int n, class U>
__device__ void update_row(const U& u, const Now& now, Optimizer optimizer, int64_t row, const T* grad,
                           Group group) {
  using A = accumulate_t<T>;
  T* weight = static_cast<T*>(u.weight) + row * u.stride_wr;
  A* states[2];
  for (int i = 0; i < 2; ++i)
    states[i] = u.state[i] ? static_cast<A*>(u.state[i]) + row * u.stride_sr : nullptr;
  const A factor = clipped_factor<A>(u, now, grad, group);
  const RowStep<A> of_row = step_on_row<A>(u, now, optimizer, row, weight, grad, factor, group);
  const bool couples = optimizer <= kAdam;  // weight decay comes with the gradient
  const A decay = couples ? A(u.weight_decay) : A(0);
  for (int d = group.lane() * n; d < u.D; d += group.lanes() * n) {
    const Pack<T, n> grads = load<n>(grad + d), weights = load<n>(weight + d);
    A w[n], g[n];
    RK_UNROLL
    for (int i = 0; i < n; ++i) {
      w[i] = of_row.keep * widen(weights.x[i]);
      g[i] = factor * widen(grads.x[i]) + decay * w[i];
    }
    if (optimizer == kSGD || optimizer == kRowWiseAdagrad || optimizer == kRowWiseRMSprop) {
      RK_UNROLL
      for (int i = 0; i < n; ++i) w[i] -= of_row.scale * g[i];
    } else if (optimizer == kAdagrad) {
      Pack<A, n> s = load<n>(states[0] + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        s.x[i] += g[i] * g[i];
        w[i] -= A(now.lr) * g[i] / (sqrt(s.x[i]) + A(u.eps));
      }
      store<n>(states[0] + d, s.x);
    } else if (optimizer == kRowWiseAdam) {
      Pack<A, n> m = load<n>(states[0] + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        m.x[i] += A(1 - u.beta1) * (g[i] - m.x[i]);
        w[i] -= of_row.scale * m.x[i];
      }
      store<n>(states[0] + d, m.x);
    } else if (optimizer == kFTRL) {
      Pack<A, n> z = load<n>(states[0] + d), sums = load<n>(states[1] + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) w[i] = ftrl(u, A(now.lr), w[i], g[i], z.x[i], sums.x[i]);
      store<n>(states[0] + d, z.x);
      store<n>(states[1] + d, sums.x);
    } else {
      Pack<A, n> m = load<n>(states[0] + d), v = load<n>(states[1] + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) adam(u, now, w[i], g[i], m.x[i], v.x[i]);
      store<n>(states[0] + d, m.x);
      store<n>(states[1] + d, v.x);
    }
    round_row<T>(u, now, row, d, w);
    store<n>(weight + d, w);
  }
}

// `live`: each table's, or null where the host has folded them.
template <class T, class U>
__device__ void update_rows(const Batch<U>& batch, const Gradients& gradients, Optimizer optimizer,
                            int log2_lanes, const Now* live) {
  const Group group{log2_lanes};
  const int64_t i = int64_t(blockIdx.x) * group.per_block() + group.index();
  if (i >= gradients.n || !gradients.starts_run(i)) return;
  const int64_t key = gradients.key(i);
  const U& u = batch.items[find(batch, &U::first_key, key)];
  const int64_t row = key - u.first_key;
  if (row < 0 || row >= u.R) return;
  const Now now = live ? load_apart(live + u.number) : now_of(u);
  if (now.skips) return;
  const T* grad = static_cast<const T*>(gradients.values) + i * gradients.stride;
  if (u.packed)
    update_row<T, kPack<T>>(u, now, optimizer, row, grad, group);
  else
    update_row<T, 1>(u, now, optimizer, row, grad, group);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_update(const Batch<Update> batch, const Gradients gradients, Optimizer optimizer,
                     int log2_lanes, const Now* live) {
  update_rows<T>(batch, gradients, optimizer, log2_lanes, live);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_update_rounded(const Batch<RoundedUpdate> batch, const Gradients gradients, Optimizer optimizer,
                             int log2_lanes, const Now* live) {
  update_rows<T>(batch, gradients, optimizer, log2_lanes, live);
}

}  // namespace cuda
}  // namespace rk
