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
// Adam's m and v of a row lie side by side where rankkernels.optim made them: one place in memory to go to,
// not two.
#pragma once

#include "cpu/embedding/params.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace update {

// Without the call of the library that __builtin_sqrtf makes of a negative x.
RK_INLINE float root(float x) {
#if RK_VECTOR_BYTES > 16
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}
RK_INLINE double root(double x) {
#if RK_VECTOR_BYTES > 16
  return _mm_cvtsd_f64(_mm_sqrt_pd(_mm_set1_pd(x)));
#else
  return __builtin_sqrt(x);
#endif
}
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
  }
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
  int64_t stride_wr, stride_sr, D;
  A lr, eps, decay, keep1, keep2, step, inverse_root, grad_factor, max_norm;
  Tail<T> tail;
  Tail<A> tail_state;

  // With a null pointer, of no use.
  __attribute__((always_inline)) Step(const Update* update, int64_t D)
      : D(D), tail(static_cast<int>(D % kLanes)), tail_state(static_cast<int>(D % kLanes)) {
    const Update u = update ? *update : Update{};
    optimizer = u.optimizer, weight = static_cast<T*>(u.weight), stride_wr = u.stride_wr;
    state1 = static_cast<A*>(u.state[0]), state2 = static_cast<A*>(u.state[1]), stride_sr = u.stride_sr;
    lr = A(u.lr), eps = A(u.eps), decay = A(u.weight_decay), keep1 = A(1 - u.beta1), keep2 = A(1 - u.beta2);
    step = A(u.step), inverse_root = A(u.inverse_root), grad_factor = A(u.grad_factor),
    max_norm = A(u.max_norm);
  }

  // Asks for the state that a step on columns [d, d + kLanes) of a row reads.
  template <Optimizer kind>
  __attribute__((always_inline)) void ask(int64_t row, int64_t d) const {
    if (kind == kAdagrad || kind == kAdam || kind == kAdamW)
      __builtin_prefetch(state1 + row * stride_sr + d, 1);
    if (kind == kAdam || kind == kAdamW) __builtin_prefetch(state2 + row * stride_sr + d, 1);
    if (kind == kRowWiseAdagrad && d == 0) __builtin_prefetch(state1 + row, 1);
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
    return most * root(squares);
  }

  // Multiplies the gradients by grad_factor and shortens those that are then longer than max_norm.
  __attribute__((noinline)) static void scale_grads(const Step& s, A* grads, int64_t n) {
    for (A* grad = grads; grad < grads + n * s.D; grad += s.D) {
      V squares = {};
      for (int64_t d = 0; d < s.D; d += kLanes) {
        const V g = s.grad_factor * load(grad + d, d + kLanes <= s.D, s.tail_state);
        squares += g * g;
      }
      A norm = root(sum_lanes<T>(squares));
      // Squares beyond the range, or so small that they lose digits: of the gradient over its largest value.
      if (s.max_norm != 0 && !(norm >= kLeastNorm && norm <= kMostNorm)) norm = scaled_norm(s, grad);
      // Not norm > max_norm: a NaN takes its row along, as it does in torch.
      const A factor =
          s.max_norm == 0 || norm <= s.max_norm ? s.grad_factor : s.grad_factor * (s.max_norm / norm);
      for (int64_t d = 0; d < s.D; ++d) grad[d] *= factor;
    }
  }

  // Adds what a row's gradient [D] adds to its s -> s.
  __attribute__((always_inline)) A add_to_state(int64_t row, const A* grad) const {
    V squares = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const bool whole = d + kLanes <= D;
      V g = load(grad + d, whole, tail_state);
      if (decay != 0) g += decay * load(weight + row * stride_wr + d, whole, tail);
      squares += g * g;
    }
    return state1[row] += sum_lanes<T>(squares) / A(D);
  }

  // scales [n] = lr / (sqrt s + eps) of rows of gradients grads [n, D], after adding to their s.
  __attribute__((always_inline)) void scale_rows(const int64_t* rows, const A* grads, int64_t n,
                                                 A* scales) const {
    for (int64_t k = 0; k < n; ++k) scales[k] = add_to_state(rows[k], grads + k * D);
    for (int64_t k = n; k % kLanes; ++k) scales[k] = 0;
    for (int64_t k = 0; k < n; k += kLanes)
      Traits<A>::store(scales + k, lr / (root(Traits<A>::load(scales + k)) + eps));
  }

  // A step on columns [d, d + kLanes) of a row, `whole` or its last, of gradient g; `scale` is scale_rows'.
  // No sum has two products in it: which of them is fused into it would be the compiler's choice, in every
  // copy that it makes of a loop anew, and a row must have the same bits wherever in a batch it comes.
  template <Optimizer kind>
  __attribute__((always_inline)) void take_columns(int64_t row, int64_t d, V g, A scale, bool whole) const {
    T* w_row = weight + row * stride_wr;
    A *s1 = state1 + row * stride_sr, *s2 = state2 + row * stride_sr;
    V w = load(w_row + d, whole, tail);
    if (kind == kAdamW)
      w -= lr * decay * w;
    else if (decay != 0)
      g += decay * w;
    if (kind == kSGD) w -= lr * g;
    if (kind == kRowWiseAdagrad) w -= scale * g;
    if (kind == kAdagrad) {
      const V sum = load(s1 + d, whole, tail_state) + g * g;
      store(s1 + d, sum, whole, tail_state);
      w -= lr * g / (root(sum) + eps);
    }
    if (kind == kAdam || kind == kAdamW) {
      V m = load(s1 + d, whole, tail_state), v = load(s2 + d, whole, tail_state);
      m += keep1 * (g - m);
      v += keep2 * (g * g - v);
      store(s1 + d, m, whole, tail_state);
      store(s2 + d, v, whole, tail_state);
      w -= step * m / (inverse_root * root(v) + eps);
    }
    store(w_row + d, w, whole, tail);
  }

  template <Optimizer kind>
  __attribute__((noinline)) static void take_as(Step s, const int64_t* rows, const A* grads, int64_t n,
                                                const int64_t* next, int64_t n_next) {
    constexpr bool kRowWise = kind == kRowWiseAdagrad;
    A scales[kRowWise ? kMostLookups : 1];
    if (kRowWise) s.scale_rows(rows, grads, n, scales);
    const int64_t D = s.D;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t row = rows[k], asked = next[k < n_next ? k : n_next - 1];
      const A* grad = grads + k * D;
      for (int64_t d = 0; d < D; d += kLanes) {
        const bool whole = d + kLanes <= D;
        s.template ask<kind>(asked, d);
        s.template take_columns<kind>(row, d, load(grad + d, whole, s.tail_state), scales[kRowWise ? k : 0],
                                      whole);
      }
    }
    for (int64_t k = n; k < n_next; ++k)
      for (int64_t d = 0; d < D; d += kLanes) s.template ask<kind>(next[k], d);
  }

  // On n <= kMostLookups distinct rows of gradients grads [n, D], which it may change; asks for the state of
  // the rows next [n_next], whose turn comes then.
  void take(const int64_t* rows, A* grads, int64_t n, const int64_t* next, int64_t n_next) const {
    if (grad_factor != 1 || max_norm != 0) scale_grads(*this, grads, n);
    if (n_next == 0) next = rows, n_next = n != 0;
    with_kind(optimizer, [&](auto kind) __attribute__((always_inline)) {
      take_as<decltype(kind)::value>(*this, rows, grads, n, next, n_next);
    });
  }
};

}  // namespace update

// Rows [i0, i1) of a coalesced sparse gradient: row rows[i] of the table has the gradient values[i], [D].
// scratch [chunk_of(D), D].
template <class T, class A>
void embedding_update(const Update& u, const int64_t* rows, const T* values, int64_t D, int64_t i0,
                      int64_t i1, A* scratch) {
  const update::Step<T> step(&u, D);
  const int64_t chunk = chunk_of(D);
  for (int64_t i = i0, end, next_end; i < i1; i = end) {
    end = i + chunk < i1 ? i + chunk : i1, next_end = end + chunk < i1 ? end + chunk : i1;
    const T* grads = values + i * D;
    const int64_t n = (end - i) * D;
    int64_t d = 0;
    for (; d + Traits<T>::lanes <= n; d += Traits<T>::lanes)
      Traits<A>::store(scratch + d, Traits<T>::load(grads + d));
    const int left = static_cast<int>(n - d);
    Tail<A>(left).store(scratch + d, Tail<T>(left).load(grads + d));
    for (int64_t k = end; k < next_end; ++k)
      for (d = 0; d < D; d += Traits<T>::lanes)
        __builtin_prefetch(step.weight + rows[k] * u.stride_wr + d, 1);
    step.take(rows + i, scratch, end - i, rows + end, next_end - end);
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
