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

template <class T>
RK_INLINE void prefetch(const Update& u, int64_t D, int64_t row) {
  using A = typename Traits<T>::scalar;
  const char* weight = reinterpret_cast<const char*>(static_cast<const T*>(u.weight) + row * u.stride_wr);
  for (int64_t i = 0; i < D * int64_t(sizeof(T)); i += 64) __builtin_prefetch(weight + i, 1);
  const void* const states[] = {u.state1, u.state2};
  for (const void* state : states) {
    if (!state) continue;
    const int64_t width = u.optimizer == kRowWiseAdagrad ? 1 : D;
    const char* p = reinterpret_cast<const char*>(static_cast<const A*>(state) + row * width);
    for (int64_t i = 0; i < width * int64_t(sizeof(A)); i += 64) __builtin_prefetch(p + i, 1);
  }
}

template <class T>
RK_INLINE void update_row(const Update& u, int64_t D, int64_t row, const typename Traits<T>::scalar* grad) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(D % kLanes));
  const Tail<A> tail_state(static_cast<int>(D % kLanes));
  const A lr = A(u.lr), eps = A(u.eps), decay = A(u.weight_decay), keep1 = A(1 - u.beta1),
          keep2 = A(1 - u.beta2);
  const bool decoupled = u.optimizer == kAdamW, rowwise = u.optimizer == kRowWiseAdagrad;
  T* weight = static_cast<T*>(u.weight) + row * u.stride_wr;
  A* state1 = u.state1 ? static_cast<A*>(u.state1) + (rowwise ? row : row * D) : nullptr;
  A* state2 = u.state2 ? static_cast<A*>(u.state2) + row * D : nullptr;
  A factor = A(u.grad_factor);
  if (u.max_norm != 0) {
    V squares = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const V g = factor * load(grad + d, d + kLanes <= D, tail_state);
      squares += g * g;
    }
    const A norm = root(splat<A>(sum_lanes<T>(squares)))[0];
    if (norm > A(u.max_norm)) factor *= A(u.max_norm) / norm;
  }
  A row_scale = 0;
  if (rowwise) {
    V squares = {};
    for (int64_t d = 0; d < D; d += kLanes) {
      const bool whole = d + kLanes <= D;
      V g = factor * load(grad + d, whole, tail_state);
      if (decay != 0) g += decay * load(weight + d, whole, tail);
      squares += g * g;
    }
    *state1 += sum_lanes<T>(squares) / A(D);
    row_scale = lr / (root(splat<A>(*state1))[0] + eps);
  }
  for (int64_t d = 0; d < D; d += kLanes) {
    const bool whole = d + kLanes <= D;
    V w = load(weight + d, whole, tail), g = factor * load(grad + d, whole, tail_state);
    if (decoupled)
      w -= lr * decay * w;
    else if (decay != 0)
      g += decay * w;
    switch (u.optimizer) {
      case kSGD:
        w -= lr * g;
        break;
      case kRowWiseAdagrad:
        w -= row_scale * g;
        break;
      case kAdagrad: {
        const V s = load(state1 + d, whole, tail_state) + g * g;
        store(state1 + d, s, whole, tail_state);
        w -= lr * g / (root(s) + eps);
        break;
      }
      default: {
        V m = load(state1 + d, whole, tail_state), v = load(state2 + d, whole, tail_state);
        m += keep1 * (g - m);
        v += keep2 * (g * g - v);
        store(state1 + d, m, whole, tail_state);
        store(state2 + d, v, whole, tail_state);
        w -= A(u.step) * m / (A(u.inverse_root) * root(v) + eps);
      }
    }
    store(weight + d, w, whole, tail);
  }
}

}  // namespace update

// Rows [i0, i1) of a coalesced sparse gradient: row rows[i] of the table has the gradient values[i], [D].
template <class T, class A>
void embedding_update(const Update& u, const int64_t* rows, const T* values, int64_t D, int64_t i0,
                      int64_t i1, A* scratch) {
  constexpr int64_t kAhead = 8;
  for (int64_t i = i0; i < i1; ++i) {
    if (i + kAhead < i1) update::prefetch<T>(u, D, rows[i + kAhead]);
    const T* grad = values + i * D;
    int64_t d = 0;
    for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
      Traits<A>::store(scratch + d, Traits<T>::load(grad + d));
    const int left = static_cast<int>(D - d);
    Tail<A>(left).store(scratch + d, Tail<T>(left).load(grad + d));
    update::update_row<T>(u, D, rows[i], scratch);
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
