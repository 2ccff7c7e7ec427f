// One step of an optimizer on one row w of a table, given the row's gradient g, for one instruction set.
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
// first w -= lr weight_decay w. Only rows that were looked up take part. The caller folds the factors that
// depend on t alone into `step` and `inverse_root`:
//
//   w -= step m / (inverse_root sqrt v + eps)
//
// State is float, double for double tables. Bytes a row: D values of w, D of each state, read and written.
#pragma once

#include "embedding_bag_args.h"
#include "vec.h"

namespace rk {
namespace RK_ISA {
namespace update {

RK_INLINE f32v root(f32v x) {
#if RK_VECTOR_BYTES == 64
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif RK_VECTOR_BYTES == 32
  return (f32v)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kFloats; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
RK_INLINE f64v root(f64v x) {
#if RK_VECTOR_BYTES == 64
  return (f64v)_mm512_sqrt_pd((__m512d)x);
#elif RK_VECTOR_BYTES == 32
  return (f64v)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

template <class T>
RK_INLINE typename Traits<T>::vec load(const T* p, bool whole, const Tail<T>& tail) {
  return whole ? Traits<T>::load(p) : tail.load(p);
}
template <class T>
RK_INLINE void store(T* p, typename Traits<T>::vec v, bool whole, const Tail<T>& tail) {
  if (whole)
    Traits<T>::store(p, v);
  else
    tail.store(p, v);
}

// Square root of one number.
RK_INLINE float root(float x) { return root(splat<float>(x))[0]; }
RK_INLINE double root(double x) { return root(splat<double>(x))[0]; }

// Where a row and its state lie; absent state lies where the row does.
template <class T>
struct Rows {
  const T* weight;
  const void *state1, *state2;
  int64_t bytes1, bytes2;  // of the states, for one column

  RK_INLINE Rows of(const Update& u, int64_t D, int64_t row) {
    using A = typename Traits<T>::scalar;
    const T* weight = static_cast<const T*>(u.weight) + row * u.stride_wr;
    const int64_t n1 = u.optimizer == kRowWiseAdagrad ? 0 : sizeof(A);
    return {
        weight,
        u.state1 ? static_cast<const A*>(u.state1) + (n1 ? row * D : row) : static_cast<const void*>(weight),
        u.state2 ? static_cast<const A*>(u.state2) + row * D : static_cast<const void*>(weight),
        u.state1 ? n1 : int64_t(sizeof(T)), u.state2 ? int64_t(sizeof(A)) : int64_t(sizeof(T))};
  }
  __attribute__((always_inline)) void ask(int64_t d) const {
    __builtin_prefetch(weight + d, 1);
    __builtin_prefetch(static_cast<const char*>(state1) + d * bytes1, 1);
    __builtin_prefetch(static_cast<const char*>(state2) + d * bytes2, 1);
  }
};

// A step on one table; made once for many rows, because nothing but local constants stays in registers.
template <class T>
struct Step {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  static constexpr int64_t kLanes = Traits<T>::lanes;
  Optimizer optimizer;
  T* weight;
  A *state1, *state2;
  int64_t stride_wr, D;
  A lr, eps, decay, keep1, keep2, step, inverse_root, grad_factor, max_norm;
  Tail<T> tail;
  Tail<A> tail_state;

  // With a null pointer, of no use.
  __attribute__((always_inline)) Step(const Update* update, int64_t D)
      : D(D), tail(static_cast<int>(D % kLanes)), tail_state(static_cast<int>(D % kLanes)) {
    const Update u = update ? *update : Update{};
    optimizer = u.optimizer, weight = static_cast<T*>(u.weight), stride_wr = u.stride_wr;
    state1 = static_cast<A*>(u.state1), state2 = static_cast<A*>(u.state2);
    lr = A(u.lr), eps = A(u.eps), decay = A(u.weight_decay), keep1 = A(1 - u.beta1), keep2 = A(1 - u.beta2);
    step = A(u.step), inverse_root = A(u.inverse_root), grad_factor = A(u.grad_factor),
    max_norm = A(u.max_norm);
  }

  // On row `row`, of gradient grad [D]; calls ask(d) for every vector of columns.
  template <class Ask>
  __attribute__((always_inline)) void take(int64_t row, const A* grad, const Ask& ask) const {
    const bool decoupled = optimizer == kAdamW, rowwise = optimizer == kRowWiseAdagrad;
    T* w_row = weight + row * stride_wr;
    A *s1 = state1 + (rowwise ? row : row * D), *s2 = state2 + row * D;
    A factor = grad_factor;
    if (max_norm != 0) {
      V squares = {};
      for (int64_t d = 0; d < D; d += kLanes) {
        const V g = factor * load(grad + d, d + kLanes <= D, tail_state);
        squares += g * g;
      }
      const A norm = root(sum_lanes<T>(squares));
      if (norm > max_norm) factor *= max_norm / norm;
    }
    A row_scale = 0;
    if (rowwise) {
      V squares = {};
      for (int64_t d = 0; d < D; d += kLanes) {
        const bool whole = d + kLanes <= D;
        V g = factor * load(grad + d, whole, tail_state);
        if (decay != 0) g += decay * load(w_row + d, whole, tail);
        squares += g * g;
      }
      *s1 += sum_lanes<T>(squares) / A(D);
      row_scale = lr / (root(*s1) + eps);
    }
    for (int64_t d = 0; d < D; d += kLanes) {
      const bool whole = d + kLanes <= D;
      ask(d);
      V w = load(w_row + d, whole, tail), g = factor * load(grad + d, whole, tail_state);
      if (decoupled)
        w -= lr * decay * w;
      else if (decay != 0)
        g += decay * w;
      switch (optimizer) {
        case kSGD:
          w -= lr * g;
          break;
        case kRowWiseAdagrad:
          w -= row_scale * g;
          break;
        case kAdagrad: {
          const V s = load(s1 + d, whole, tail_state) + g * g;
          store(s1 + d, s, whole, tail_state);
          w -= lr * g / (root(s) + eps);
          break;
        }
        default: {
          V m = load(s1 + d, whole, tail_state), v = load(s2 + d, whole, tail_state);
          m += keep1 * (g - m);
          v += keep2 * (g * g - v);
          store(s1 + d, m, whole, tail_state);
          store(s2 + d, v, whole, tail_state);
          w -= step * m / (inverse_root * root(v) + eps);
        }
      }
      store(w_row + d, w, whole, tail);
    }
  }
};

}  // namespace update

// Rows [i0, i1) of a coalesced sparse gradient: row rows[i] of the table has the gradient values[i], [D].
template <class T, class A>
void embedding_update(const Update& u, const int64_t* rows, const T* values, int64_t D, int64_t i0,
                      int64_t i1, A* scratch) {
  constexpr int64_t kAhead = 8;
  const update::Step<T> step(&u, D);
  for (int64_t i = i0; i < i1; ++i) {
    const auto ahead = update::Rows<T>::of(u, D, rows[i + kAhead < i1 ? i + kAhead : i1 - 1]);
    const T* grad = values + i * D;
    int64_t d = 0;
    for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
      Traits<A>::store(scratch + d, Traits<T>::load(grad + d));
    const int left = static_cast<int>(D - d);
    Tail<A>(left).store(scratch + d, Tail<T>(left).load(grad + d));
    step.take(rows[i], scratch, [&](int64_t d) __attribute__((always_inline)) { ahead.ask(d); });
  }
}

template void embedding_update<float, float>(const Update&, const int64_t*, const float*, int64_t, int64_t,
                                             int64_t, float*);
template void embedding_update<double, double>(const Update&, const int64_t*, const double*, int64_t, int64_t,
                                               int64_t, double*);
template void embedding_update<fp16, float>(const Update&, const int64_t*, const fp16*, int64_t, int64_t,
                                            int64_t, float*);
template void embedding_update<bf16, float>(const Update&, const int64_t*, const bf16*, int64_t, int64_t,
                                            int64_t, float*);

}  // namespace RK_ISA
}  // namespace rk
