// GRU with an attention that scales its update gate, for one instruction set.
//
// Of a sample, positions l = 0 .. length - 1, h_{-1} = 0, with h = h_{l-1} and x = x_l:
//
//   u = sigmoid(W_u x + U_u h + b_u)    c = U_n h + b_c    g = W_n x + b_n
//   r = sigmoid(W_r x + U_r h + b_r)    n = tanh(g + r c)
//   h_l = h + a_l u (n - h);            beyond the length the results are zeros
//
// Backward, e = dL/dh_l from above and from l + 1; the gates are computed again from h, which `out` keeps:
//
//   da = <e, u (n - h)>                 p = a u e (1 - n^2)
//   du = a e (n - h) u (1 - u)          dr = p c r (1 - r)          dc = p r          dg = p
//   dh = e (1 - a u) + U_u^T du + U_r^T dr + U_n^T dc       dx = W_u^T du + W_r^T dr + W_n^T dg
//   dU += [du, dr, dc] h^T              dW += [du, dr, dg] x^T      db += [du, dr, dc, dg]
//
// [u, r, c, g] is one GEMM of [h, x], in which c's weights of x and g's of h are zeros: 8 D (D + K) flops a
// position with K inputs, 24 D (D + K) backward. Nothing is stored but h, and in the backward dx. A block of
// samples, the longest first, goes through its positions together: the weights stay in L1 or L2.
#pragma once

#include "cpu/recurrent/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace recurrent {

// What a position makes of its state and of the products.
template <class T>
struct Cell {
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  V h, u, r, c, n;

  RK_INLINE Cell(const A* state, const A* product, int64_t width) {
    h = Traits<A>::load(state);
    u = sigmoid(Traits<A>::load(product));
    r = sigmoid(Traits<A>::load(product + width));
    c = Traits<A>::load(product + 2 * width);
    n = tanh(Traits<A>::load(product + 3 * width) + r * c);
  }
};

// Samples of the block that have a position l: the first so many.
RK_INLINE int64_t active(const int64_t* order, const int64_t* lengths, int64_t rows, int64_t l) {
  while (rows > 0 && lengths[order[rows - 1]] <= l) --rows;
  return rows;
}

template <class T>
RK_INLINE Accumulator<T> attention_of(const Augru<T>& a, int64_t sample, int64_t l) {
  return a.attention ? to_scalar(a.attention[sample * a.stride_attention + l * a.stride_attention_step]) : 1;
}

template <class T>
RK_INLINE void clear(T* p, int64_t n) {
  if (n) __builtin_memset(static_cast<void*>(p), 0, n * sizeof(T));  // an empty tensor has no memory
}

// The inputs of position l beside the states, and the products of both.
template <class T>
RK_INLINE void multiply(const Augru<T>& a, const AugruScratch<Accumulator<T>>& s, const int64_t* order,
                        int64_t rows, int64_t l, const Tail<T>& tail) {
  using A = Accumulator<T>;
  const int64_t ld = padded<A>(a.columns), ldp = padded<A>(4 * a.width);
  for (int64_t m = 0; m < rows; ++m)
    widen_row(a.x + order[m] * a.stride_sample + l * a.stride_step, s.state + m * ld + a.width, a.inputs,
              tail);
  gemm<A>(rows, 4 * a.width / Traits<A>::lanes, a.columns, {s.state, ld, 1}, a.weight, ldp, s.product, ldp,
          a.bias, 0);
}

}  // namespace recurrent

template <class T>
void augru(Augru<T> a, Range samples, AugruScratch<Accumulator<T>> s) {
  using namespace recurrent;
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t *order = a.order + samples.begin, D = a.D;
  const int64_t ld = padded<A>(a.columns), ldp = padded<A>(4 * a.width);
  const Tail<T> tail(static_cast<int>(D % kLanes)), input_tail(static_cast<int>(a.inputs % kLanes));
  int64_t rows = samples.end - samples.begin;
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = order[m], length = a.lengths[b];
    clear(a.out + (b * a.L + length) * D, (a.L - length) * D);
  }
  for (int64_t l = 0; l < a.L && (rows = active(order, a.lengths, rows, l)) > 0; ++l) {
    multiply(a, s, order, rows, l, input_tail);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = order[m];
      A* state = s.state + m * ld;
      T* out = a.out + (b * a.L + l) * D;
      const A attention = attention_of(a, b, l);
      for (int64_t d = 0; d < D; d += kLanes) {
        const Cell<T> cell(state + d, s.product + m * ldp + d, a.width);
        const auto h = cell.h + attention * cell.u * (cell.n - cell.h);
        Traits<A>::store(state + d, h);
        store_columns(out + d, h, d + kLanes <= D, tail);
      }
    }
  }
}

template <class T>
void augru_backward(AugruBackward<T> k, Range samples, AugruScratch<Accumulator<T>> s) {
  using namespace recurrent;
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Augru<T> a = k.forward;
  const int64_t *order = a.order + samples.begin, D = a.D, all = samples.end - samples.begin;
  const int64_t ld = padded<A>(a.columns), ldp = padded<A>(4 * a.width);
  const int64_t vecs = (a.columns + kLanes - 1) / kLanes;
  const Tail<T> tail(static_cast<int>(D % kLanes)), input_tail(static_cast<int>(a.inputs % kLanes));
  clear(s.grad_state, all * ld);
  for (int64_t m = 0; m < all; ++m) {
    const int64_t b = order[m], length = a.lengths[b];
    clear(k.grad_x + (b * a.L + length) * a.inputs, (a.L - length) * a.inputs);
    if (k.grad_attention) clear(k.grad_attention + b * a.L + length, a.L - length);
  }
  for (int64_t l = all ? a.lengths[order[0]] - 1 : -1; l >= 0; --l) {
    const int64_t rows = active(order, a.lengths, all, l);
    for (int64_t m = 0; m < rows; ++m)
      if (l > 0)
        widen_row(a.out + (order[m] * a.L + l - 1) * D, s.state + m * ld, D, tail);
      else
        clear(s.state + m * ld, a.width);
    multiply(a, s, order, rows, l, input_tail);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = order[m];
      const T* grad_out = k.grad_out + b * k.stride_grad + l * k.stride_grad_step;
      A *product = s.product + m * ldp, *grad_state = s.grad_state + m * ld;
      const A attention = attention_of(a, b, l);
      V of_attention = {};
      for (int64_t d = 0; d < D; d += kLanes) {
        const Cell<T> f(s.state + m * ld + d, product + d, a.width);
        const V e = Traits<A>::load(grad_state + d) + load_columns(grad_out + d, d + kLanes <= D, tail);
        const V moved = f.u * (f.n - f.h), p = attention * f.u * e * (1 - f.n * f.n);
        const V grads[] = {attention * e * moved * (1 - f.u), p * f.c * f.r * (1 - f.r), p * f.r, p};
        of_attention += e * moved;
        Traits<A>::store(grad_state + d, e * (1 - attention * f.u));
#pragma GCC unroll 4
        for (int gate = 0; gate < 4; ++gate) {
          A* sum = s.grad_bias + gate * a.width + d;
          Traits<A>::store(product + gate * a.width + d, grads[gate]);
          Traits<A>::store(sum, Traits<A>::load(sum) + grads[gate]);
        }
      }
      if (k.grad_attention) assign(k.grad_attention[b * a.L + l], sum_lanes<T>(of_attention));
    }
    gemm<A>(4 * a.width, vecs, rows, {s.product, 1, ldp}, s.state, ld, s.grad_weight, ld, s.grad_weight, ld);
    for (int64_t m = 0; m < rows; ++m) clear(s.grad_state + m * ld + a.width, ld - a.width);
    gemm<A>(rows, vecs, 4 * a.width, {s.product, ldp, 1}, k.weight_rows, ld, s.grad_state, ld, s.grad_state,
            ld);
    for (int64_t m = 0; m < rows; ++m)
      narrow_row(s.grad_state + m * ld + a.width, k.grad_x + (order[m] * a.L + l) * a.inputs, a.inputs,
                 input_tail);
  }
}

#define RK_INSTANTIATE(T)                                                \
  template void augru<T>(Augru<T>, Range, AugruScratch<Accumulator<T>>); \
  template void augru_backward<T>(AugruBackward<T>, Range, AugruScratch<Accumulator<T>>);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
