// The steps that dense Adam or AdamW took on rows while no batch looked them up, for one instruction set.
//
// A row's w, m and v are as of step t; up to step T its gradients were zero. With s's rate lr_s and decay
// d_s,
//
//   w <- P_t w - m S(sqrt v)       m <- beta1^(T-t) m       v <- beta2^(T-t) v
//   S(x) = sum_{s = t+1 .. T} q_s / (a_s x + eps)           a_s = sqrt(beta2^(s-t) / (1 - beta2^s))
//   q_s = P_s lr_s beta1^(s-t) / (1 - beta1^s)              P_s = prod_{u = s+1 .. T} (1 - lr_u d_u)
//
// For all rows of one t, S is one function of one number. With any g > 0, r = sqrt(a_s / g) and z = (g x -
// eps) / (g x + eps),
//
//   1 / (a_s x + eps) = 1 / (g x + eps) (1 + 2 sum_{n >= 1} tau^n T_n(z)) / r       tau = (1 - r) / (1 + r)
//
// with Chebyshev's polynomials T_n: their generating function. So S(x) (g x + eps) = sum_n c_n T_n(z), whose
// c_n the steps add to (catch_up.cpp: adam_history). Where g is the a_s of the steps that count, tau is
// small: kAdamTerms terms are exact to 1e-11 from t = 1 on, 4 to 1e-9 from t = 1000 on, and for every x: z is
// in
// [-1, 1] however near to eps or to zero sqrt v is.
//
// Bytes a row: D values of w, m and v, read and written. Flops a value: 12 and 3 a term.
#pragma once

#include "cpu/embedding/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace catch_up {

// What the steps after t do to a row. Terms too small for A to tell are zero.
template <class A>
struct Idle {
  A decay, keep1, keep2, centre, term[kAdamTerms];
  int n;  // terms up to the last one that is not zero

  RK_INLINE void set(const CatchUp& c, int64_t t) {
    const AdamStart& start = c.history[t - c.base];
    const AdamStart& powers = c.history[c.step - t];
    decay = A(c.decay / start.decay), keep1 = A(powers.power1), keep2 = A(powers.power2);
    centre = A(start.centre);
    const A least = A(c.decay * start.term[0]) * (sizeof(A) == 4 ? A(1e-9) : A(1e-17));
    n = 1;
    for (int j = 0; j < kAdamTerms; ++j) {
      const A value = A(c.decay * start.term[j]);
      const bool counts = !(__builtin_fabs(value) <= least);  // a NaN stays
      term[j] = counts ? value : A(0);
      n = counts ? j + 1 : n;
    }
  }
};

// The first n terms; those beyond the row's own are zero and change no bit.
template <class T>
RK_INLINE void catch_up_row(const CatchUp& c, int64_t row, const Idle<Accumulator<T>>& idle, int n,
                            const Tail<T>& tail, const Tail<Accumulator<T>>& tail_state) {
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  T* weight = static_cast<T*>(c.weight) + row * c.stride_wr;
  A *state1 = static_cast<A*>(c.state[0]) + row * c.stride_sr,
    *state2 = static_cast<A*>(c.state[1]) + row * c.stride_sr;
  const A eps = A(c.eps);
  for (int64_t d = 0; d < c.D; d += kLanes) {
    const bool whole = d + kLanes <= c.D;
    const V m = load_columns(state1 + d, whole, tail_state), v = load_columns(state2 + d, whole, tail_state);
    const V gx = idle.centre * square_root(v), divisor = gx + eps, z = (gx - eps) / divisor;
    V b1 = {}, b2 = {};  // Clenshaw's sums
    for (int j = n - 1; j > 0; --j) {
      const V b = (idle.term[j] - b2) + (z + z) * b1;
      b2 = b1, b1 = b;
    }
    const V step = m * ((idle.term[0] - b2) + z * b1) / divisor;
    store_columns(weight + d, idle.decay * load_columns(weight + d, whole, tail) - step, whole, tail);
    store_columns(state1 + d, idle.keep1 * m, whole, tail_state);
    store_columns(state2 + d, idle.keep2 * v, whole, tail_state);
  }
}

}  // namespace catch_up

// As many terms for all rows of a chunk, which the processor can foretell. A row that never had a gradient
// has no moments and only decays.
template <class T>
void embedding_catch_up_rows(const CatchUp& c, const IdleRow* rows, int64_t n) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(c.D % kLanes));
  const Tail<A> tail_state(static_cast<int>(c.D % kLanes));
  catch_up::Idle<A> idle[kMostIdle];
  int terms = 1;
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i].last <= 0) continue;
    idle[i].set(c, rows[i].last);
    terms = idle[i].n > terms ? idle[i].n : terms;
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t last = rows[i].last;
    if (last > 0) {
      catch_up::catch_up_row<T>(c, rows[i].row, idle[i], terms, tail, tail_state);
      continue;
    }
    T* weight = static_cast<T*>(c.weight) + rows[i].row * c.stride_wr;
    const A decay = A(c.decay / c.history[-last > c.base ? -last - c.base : 0].decay);
    for (int64_t d = 0; d < c.D; d += kLanes) {
      const bool whole = d + kLanes <= c.D;
      store_columns(weight + d, decay * load_columns(weight + d, whole, tail), whole, tail);
    }
  }
}

#define RK_INSTANTIATE(T) template void embedding_catch_up_rows<T>(const CatchUp&, const IdleRow*, int64_t);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
