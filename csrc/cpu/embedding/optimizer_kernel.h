// One step of an optimizer on one row w of a table, given the row's gradient g, for one instruction set.
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
// weight_decay w for g, in adamw and row-wise adam first w -= lr weight_decay w. Only rows that were looked
// up take part. The caller folds the factors that depend on t alone into `step` and `inverse_root`:
//
//   w -= step m / (inverse_root sqrt v + eps)
//
// In a table of 16 bits w is rounded to the nearest or stochastically: rounding_kernel.h.
//
// State is float, double for double tables. Bytes a row: D values of w, D of each state, read and written.
// Adam's m and v of a row lie side by side where rankkernels.optim made them: one place in memory to go to,
// not two.
#pragma once

#include "cpu/embedding/catch_up_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/embedding/rounding_kernel.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace update {

template <Optimizer optimizer>
struct Kind {
  static constexpr Optimizer value = optimizer;
};
// Calls body(Kind).
template <class Body>
RK_INLINE void with_kind(Optimizer optimizer, const Body& body) {
  switch (optimizer) {
    case kSGD:
      return body(Kind<kSGD>());
    case kAdagrad:
      return body(Kind<kAdagrad>());
    case kRowWiseAdagrad:
      return body(Kind<kRowWiseAdagrad>());
    case kAdam:
      return body(Kind<kAdam>());
    case kAdamW:
      return body(Kind<kAdamW>());
    case kFTRL:
      return body(Kind<kFTRL>());
    case kRowWiseAdam:
      return body(Kind<kRowWiseAdam>());
    case kRowWiseRMSprop:
      return body(Kind<kRowWiseRMSprop>());
  }
}

// Whether the step on a row begins with a number of the whole row.
template <Optimizer kind>
constexpr bool kRowWise = kRules[kind].row_wise > 0;

// x^power, slowly.
template <class V, class A>
__attribute__((noinline)) static V power_of(V x, A power) {
  constexpr int lanes = sizeof(V) / sizeof(A);
  for (int i = 0; i < lanes; ++i)
    x[i] = sizeof(A) == 4 ? __builtin_powf(x[i], power) : __builtin_pow(x[i], power);
  return x;
}

// A step on one table.
template <class T>
struct Step {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  static constexpr int64_t kLanes = Traits<T>::lanes;
  Optimizer optimizer;
  T* weight;
  A *state1, *state2;
  const CatchUp* idle;
  int64_t stride_wr, stride_sr, D;
  uint64_t rounding;
  double count;
  A lr, eps, decay, keep1, keep2, step, inverse_root, grad_factor, max_norm, own[2];
  Tail<T> tail;
  Tail<A> tail_state;

  // `update` may be null; the object must then not be used.
  RK_INLINE Step(const Update* update, int64_t D)
      : D(D), tail(static_cast<int>(D % kLanes)), tail_state(static_cast<int>(D % kLanes)) {
    const Update u = update ? *update : Update{};
    optimizer = u.optimizer, weight = static_cast<T*>(u.weight), stride_wr = u.stride_wr;
    state1 = static_cast<A*>(u.state[0]), state2 = static_cast<A*>(u.state[1]), stride_sr = u.stride_sr;
    lr = A(u.lr), eps = A(u.eps), decay = A(u.weight_decay), keep1 = A(1 - u.beta1), keep2 = A(1 - u.beta2);
    step = A(u.step), inverse_root = A(u.inverse_root), grad_factor = A(u.grad_factor), idle = u.idle,
    max_norm = A(u.max_norm), own[0] = A(u.own[0]), own[1] = A(u.own[1]);
    rounding = u.rounding, count = u.count;
  }

  // Prefetches the state that a step on columns [d, d + kLanes) of a row reads.
  template <Optimizer kind>
  RK_INLINE void prefetch_state(int64_t row, int64_t d) const {
    if (kRules[kind].elementwise > 0) __builtin_prefetch(state1 + row * stride_sr + d, 1);
    if (kRules[kind].elementwise > 1) __builtin_prefetch(state2 + row * stride_sr + d, 1);
    if (d == 0) prefetch_row_state<kind, 3>(row);
  }
  template <Optimizer kind, int kLevel>
  RK_INLINE void prefetch_row_state(int64_t row) const {
    constexpr Rule rule = kRules[kind];
    if (rule.row_wise > 0 && rule.elementwise == 0) __builtin_prefetch(state1 + row, 1, kLevel);
    if (rule.row_wise > 0 && rule.elementwise + rule.row_wise == 2)
      __builtin_prefetch(state2 + row, 1, kLevel);
    if (kind == kAdamW && idle) __builtin_prefetch(idle->last_steps + row, 1, kLevel);
  }

  // Under exact Adam a row first takes the steps that it missed.
  template <Optimizer kind>
  RK_INLINE void catch_up(int64_t row) const {
    if (kind != kAdamW || !idle) return;
    int32_t& last = idle->last_steps[row];
    if (idle->is_idle(last)) catch_up::catch_up_row<T>(*idle, row, last);
    last = static_cast<int32_t>(idle->step + 1);
  }

  // Norms between them are what their squares' sum says: its terms are then normal numbers or too small to
  // count.
  static constexpr A kLeastNorm = sizeof(A) == 4 ? A(1e-15) : A(1e-130),
                     kMostNorm = sizeof(A) == 4 ? A(1e18) : A(1e150);

  __attribute__((noinline)) static A scaled_norm(const Step& s, const A* grad) {
    A most = 0, squares = 0;
    for (int64_t d = 0; d < s.D; ++d) {
      const A g = __builtin_fabs(s.grad_factor * grad[d]);
      if (!(g <= most)) most = g;
      if (g != g) return g;
    }
    if (most == 0 || most - most != 0) return most;
    for (int64_t d = 0; d < s.D; ++d) {
      const A g = s.grad_factor * grad[d] / most;
      squares += g * g;
    }
    return most * square_root(squares);
  }

  // Multiplies the gradients by grad_factor and shortens those that are then longer than max_norm.
  __attribute__((noinline)) static void scale_grads(const Step& s, A* grads, int64_t n) {
    for (A* grad = grads; grad < grads + n * s.D; grad += s.D) {
      V squares = {};
      for (int64_t d = 0; d < s.D; d += kLanes) {
        const V g = s.grad_factor * load_columns(grad + d, d + kLanes <= s.D, s.tail_state);
        squares += g * g;
      }
      A norm = square_root(sum_lanes<T>(squares));
      // Squares beyond the range, or so small that they lose digits: of the gradient over its largest value.
      if (s.max_norm != 0 && !(norm >= kLeastNorm && norm <= kMostNorm)) norm = scaled_norm(s, grad);
      // Not norm > max_norm: a NaN takes its row along, as it does in torch.
      const A factor =
          s.max_norm == 0 || norm <= s.max_norm ? s.grad_factor : s.grad_factor * (s.max_norm / norm);
      for (int64_t d = 0; d < s.D; ++d) grad[d] *= factor;
    }
  }

  // What the columns of a row share: w -= shrink w, then w -= scale g, or scale m.
  struct RowStep {
    A scale = 0, shrink = 0;
  };

  // Adds what a row's gradient [D] adds to its s or v -> that.
  template <Optimizer kind>
  RK_INLINE A add_to_state(int64_t row, const A* grad) const {
    V squares = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const bool whole = d + kLanes <= D;
      V g = load_columns(grad + d, whole, tail_state);
      if (kind == kRowWiseAdagrad && decay != 0)
        g += decay * load_columns(weight + row * stride_wr + d, whole, tail);
      squares += g * g;
    }
    const A mean = sum_lanes<T>(squares) / A(D);
    if (kind == kRowWiseAdagrad) return state1[row] += mean;
    A& v = kind == kRowWiseAdam ? state2[row] : state1[row];
    return v += keep2 * (mean - v);
  }

  // The decay of a row that was last touched by step `last`, which becomes this one; 0 is none.
  RK_INLINE A shrink_of(A& last) const {
    const A shrink = lr * decay * (last == 0 ? A(1) : A(count) - last);
    last = A(count);
    return shrink > own[0] ? own[0] : shrink;
  }

  template <Optimizer kind>
  RK_INLINE RowStep step_on_row(int64_t row, const A* grad) const {
    RowStep of_row;
    if (kRowWise<kind>)
      of_row.scale = step / (inverse_root * square_root(add_to_state<kind>(row, grad)) + eps);
    if (kind == kRowWiseRMSprop) of_row.shrink = shrink_of(state2[row]);
    return of_row;
  }

  // scales [n] of rows of gradients grads [n, D], after adding to their state.
  template <Optimizer kind>
  RK_INLINE void scale_rows(const int64_t* rows, const A* grads, int64_t n, A* scales) const {
    for (int64_t k = 0; k < n; ++k) scales[k] = add_to_state<kind>(rows[k], grads + k * D);
    for (int64_t k = n; k % kLanes; ++k) scales[k] = 0;
    for (int64_t k = 0; k < n; k += kLanes)
      Traits<A>::store(scales + k, step / (inverse_root * square_root(Traits<A>::load(scales + k)) + eps));
  }

  // Applies the step to columns [d, d + kLanes) of a row, `whole` or its last, of gradient g, and rounds. No
  // sum has two products: which of them is fused would be the compiler's choice in each copy of a loop, and a
  // row must have the same bits wherever in a batch it comes.
  template <Optimizer kind, class Round>
  RK_INLINE void apply_columns(int64_t row, int64_t d, V g, RowStep of_row, bool whole,
                               const Round& round) const {
    T* w_row = weight + row * stride_wr;
    A *s1 = state1 + row * stride_sr, *s2 = state2 + row * stride_sr;
    V w = load_columns(w_row + d, whole, tail);
    if (kind == kAdamW || kind == kRowWiseAdam)
      w -= lr * decay * w;
    else if (kind == kRowWiseRMSprop)
      w -= of_row.shrink * w;
    else if (kind != kFTRL && decay != 0)
      g += decay * w;
    if (kind == kSGD) w -= lr * g;
    if (kind == kRowWiseAdagrad || kind == kRowWiseRMSprop) w -= of_row.scale * g;
    if (kind == kAdagrad) {
      const V sum = load_columns(s1 + d, whole, tail_state) + g * g;
      store_columns(s1 + d, sum, whole, tail_state);
      w -= lr * g / (square_root(sum) + eps);
    }
    if (kind == kAdam || kind == kAdamW || kind == kRowWiseAdam) {
      V m = load_columns(s1 + d, whole, tail_state);
      m += keep1 * (g - m);
      store_columns(s1 + d, m, whole, tail_state);
      if (kind == kRowWiseAdam) {
        w -= of_row.scale * m;
      } else {
        V v = load_columns(s2 + d, whole, tail_state);
        v += keep2 * (g * g - v);
        store_columns(s2 + d, v, whole, tail_state);
        w -= step * m / (inverse_root * square_root(v) + eps);
      }
    }
    if (kind == kFTRL) {
      V z = load_columns(s1 + d, whole, tail_state), n = load_columns(s2 + d, whole, tail_state);
      w = ftrl(w, g, z, n);
      store_columns(s1 + d, z, whole, tail_state);
      store_columns(s2 + d, n, whole, tail_state);
    }
    store_columns(w_row + d, round(w), whole, tail);
  }

  // The new w; z and n are changed. A NaN stays.
  RK_INLINE V ftrl(V w, V g, V& z, V& n) const {
    const A power = own[0], l1 = own[1], inverse_lr = 1 / lr;
    const auto root = [&](V x) __attribute__((always_inline)) {
      return power == A(.5) ? square_root(x) : power_of(x, power);
    };
    const V before = root(n);
    n += g * g;
    const V after = root(n);
    z += g;
    z -= (after - before) * inverse_lr * w;
    const V beyond = z > 0 ? l1 - z : -l1 - z, magnitude = z > 0 ? z : -z;
    return magnitude <= l1 ? V{} : beyond / ((eps + after) * inverse_lr + decay);
  }

  template <Optimizer kind, class Rounding>
  __attribute__((noinline)) static void apply_as(Step s, const int64_t* rows, const A* grads, int64_t n,
                                                 const int64_t* next, int64_t n_next) {
    A scales[kRowWise<kind> ? kMostLookups : 1];
    if (kRowWise<kind>) s.template scale_rows<kind>(rows, grads, n, scales);
    const int64_t D = s.D;
    Rounding rounding(s.rounding, static_cast<uint32_t>(s.count), rows, n, D);
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = rows[k], ahead = next[k < n_next ? k : n_next - 1];
      const A* grad = grads + k * D;
      s.template catch_up<kind>(row);
      RowStep of_row;
      if (kRowWise<kind>) of_row.scale = scales[k];
      if (kind == kRowWiseRMSprop) of_row.shrink = s.shrink_of(s.state2[row]);
      for (int64_t d = 0; d < D; d += kLanes) {
        const bool whole = d + kLanes <= D;
        s.template prefetch_state<kind>(ahead, d);
        s.template apply_columns<kind>(row, d, load_columns(grad + d, whole, s.tail_state), of_row, whole,
                                       [&](V w) __attribute__((always_inline)) { return rounding(w, k, d); });
      }
    }
    for (int64_t k = n; k < n_next; ++k)
      for (int64_t d = 0; d < D; d += kLanes) s.template prefetch_state<kind>(next[k], d);
  }

  // Applies the step to n <= kMostLookups distinct rows of gradients grads [n, D], which it may change;
  // prefetches the state of the rows next [n_next], which come after.
  void apply(const int64_t* rows, A* grads, int64_t n, const int64_t* next, int64_t n_next) const {
    if (grad_factor != 1 || max_norm != 0) scale_grads(*this, grads, n);
    if (n_next == 0) next = rows, n_next = n != 0;
    with_kind(optimizer, [&](auto kind) __attribute__((always_inline)) {
      constexpr Optimizer kKind = decltype(kind)::value;
      if constexpr (sizeof(T) == 2)
        if (rounding) return apply_as<kKind, Stochastically<T>>(*this, rows, grads, n, next, n_next);
      apply_as<kKind, ToNearest>(*this, rows, grads, n, next, n_next);
    });
  }
};

}  // namespace update

template <class T>
void embedding_optimizer_step(const SparseStep<T>& a, Range range, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t D = a.D, chunk = chunk_of(D);
  const update::Step<T> step(&a.update, D);
  for (int64_t i = range.begin, end, next_end; i < range.end; i = end) {
    end = i + chunk < range.end ? i + chunk : range.end;
    next_end = end + chunk < range.end ? end + chunk : range.end;
    const T* grads = a.values + i * D;
    const int64_t n = (end - i) * D;
    int64_t d = 0;
    for (; d + Traits<T>::lanes <= n; d += Traits<T>::lanes)
      Traits<A>::store(scratch + d, Traits<T>::load(grads + d));
    const int left = static_cast<int>(n - d);
    Tail<A>(left).store(scratch + d, Tail<T>(left).load(grads + d));
    for (int64_t k = end; k < next_end; ++k)
      for (d = 0; d < D; d += Traits<T>::lanes)
        __builtin_prefetch(step.weight + a.rows[k] * step.stride_wr + d, 1);
    step.apply(a.rows + i, scratch, end - i, a.rows + end, next_end - end);
  }
}

#define RK_INSTANTIATE(T) \
  template void embedding_optimizer_step<T>(const SparseStep<T>&, Range, Accumulator<T>*);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
