// GRU with an attention that scales its update gate, for one instruction set.
//
// Of a sample, positions l = 0 .. length - 1, h_{-1} = 0, gates g = [g_u, g_r, g_n] = W x + b made before:
//
//   u = sigmoid(g_u + U_u h)    r = sigmoid(g_r + U_r h)    c = U_n h + b_n    n = tanh(g_n + r c)
//   h_l = h + a_l u (n - h)     with h = h_{l-1};   beyond the length the results are zeros
//
// Backward, e = dL/dh_l from above and from l + 1; u, r, c, n are computed again from h, which `out` keeps:
//
//   da = <e, u (n - h)>     p = a u e (1 - n^2)                        the candidate's g_n
//   du = a e (n - h) u (1 - u)     dr = p c r (1 - r)                  those of g_u and g_r
//   dh = e (1 - a u) + U_u^T du + U_r^T dr + U_n^T (p r)
//   dU += [du, dr, p r] h^T        db_n += p r
//
// A position needs 6 D^2 flops forward and 18 D^2 backward, 4 D loads and stores of the stored type forward,
// 9 D backward. A block of samples, the longest first, goes through its positions together, so that each
// step is a GEMM whose weights stay in L1 or L2.
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

template <class V>
RK_INLINE V tanh(V x) {
  return 2 * sigmoid(2 * x) - 1;
}

// What a position makes of its gates and of the product [U_u h, U_r h, c].
template <class T>
struct Cell {
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  V h, u, r, c, n;

  RK_INLINE Cell(const Augru<T>& a, const T* gates, const A* state, const A* product, int64_t d, bool whole,
                 const Tail<T>& tail) {
    const auto gate = [&](int64_t i) { return load_columns(gates + i * a.D + d, whole, tail); };
    h = Traits<A>::load(state + d);
    u = sigmoid(gate(0) + Traits<A>::load(product + d));
    r = sigmoid(gate(1) + Traits<A>::load(product + a.width + d));
    c = Traits<A>::load(product + 2 * a.width + d);
    n = tanh(gate(2) + r * c);
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
  __builtin_memset(static_cast<void*>(p), 0, n * sizeof(T));
}

template <class T>
RK_INLINE void multiply(const Augru<T>& a, const AugruScratch<Accumulator<T>>& s, int64_t rows) {
  using A = Accumulator<T>;
  gemm<A>(rows, 3 * a.width / Traits<A>::lanes, a.width, {s.state, padded<A>(a.width), 1}, a.weight,
          padded<A>(3 * a.width), s.product, padded<A>(3 * a.width), a.bias, 0);
}

}  // namespace recurrent

template <class T>
void augru(Augru<T> a, Range samples, AugruScratch<Accumulator<T>> s) {
  using namespace recurrent;
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t *order = a.order + samples.begin, D = a.D;
  const int64_t lds = padded<A>(a.width), ldp = padded<A>(3 * a.width);
  const Tail<T> tail(static_cast<int>(D % kLanes));
  int64_t rows = samples.end - samples.begin;
  clear(s.state, rows * lds);
  for (int64_t m = 0; m < rows; ++m) {
    const int64_t b = order[m], length = a.lengths[b];
    clear(a.out + (b * a.L + length) * D, (a.L - length) * D);
  }
  for (int64_t l = 0; (rows = active(order, a.lengths, rows, l)) > 0 && l < a.L; ++l) {
    multiply(a, s, rows);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = order[m];
      const T* gates = a.gates + b * a.stride_sample + l * a.stride_step;
      T* out = a.out + (b * a.L + l) * D;
      const A attention = attention_of(a, b, l);
      for (int64_t d = 0; d < D; d += kLanes) {
        const bool whole = d + kLanes <= D;
        const Cell<T> cell(a, gates, s.state + m * lds, s.product + m * ldp, d, whole, tail);
        const auto h = cell.h + attention * cell.u * (cell.n - cell.h);
        Traits<A>::store(s.state + m * lds + d, h);
        store_columns(out + d, h, whole, tail);
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
  const int64_t lds = padded<A>(a.width), ldp = padded<A>(3 * a.width), vecs = a.width / kLanes;
  const Tail<T> tail(static_cast<int>(D % kLanes));
  clear(s.grad_state, all * lds);
  for (int64_t m = 0; m < all; ++m) {
    const int64_t b = order[m], length = a.lengths[b];
    clear(k.grad_gates + (b * a.L + length) * 3 * D, (a.L - length) * 3 * D);
    if (k.grad_attention) clear(k.grad_attention + b * a.L + length, a.L - length);
  }
  for (int64_t l = all ? a.lengths[order[0]] - 1 : -1; l >= 0; --l) {
    const int64_t rows = active(order, a.lengths, all, l);
    for (int64_t m = 0; m < rows; ++m)
      if (l > 0)
        widen_row(a.out + (order[m] * a.L + l - 1) * D, s.state + m * lds, D, tail);
      else
        clear(s.state + m * lds, lds);
    multiply(a, s, rows);
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t b = order[m], position = b * a.L + l;
      const T* gates = a.gates + b * a.stride_sample + l * a.stride_step;
      const T* grad_out = k.grad_out + b * k.stride_grad + l * k.stride_grad_step;
      T* grad_gates = k.grad_gates + position * 3 * D;
      A *product = s.product + m * ldp, *grad_state = s.grad_state + m * lds;
      const A attention = attention_of(a, b, l);
      V of_attention = {};
      for (int64_t d = 0; d < D; d += kLanes) {
        const bool whole = d + kLanes <= D;
        const Cell<T> f(a, gates, s.state + m * lds, product, d, whole, tail);
        const V e = Traits<A>::load(grad_state + d) + load_columns(grad_out + d, whole, tail);
        const V moved = f.u * (f.n - f.h), grad_n = attention * f.u * e * (1 - f.n * f.n);
        const V grad_u = attention * e * moved * (1 - f.u), grad_r = grad_n * f.c * f.r * (1 - f.r);
        of_attention += e * moved;
        Traits<A>::store(product + d, grad_u);
        Traits<A>::store(product + a.width + d, grad_r);
        Traits<A>::store(product + 2 * a.width + d, grad_n * f.r);
        Traits<A>::store(grad_state + d, e * (1 - attention * f.u));
        Traits<A>::store(s.grad_bias + d, Traits<A>::load(s.grad_bias + d) + grad_n * f.r);
        store_columns(grad_gates + d, grad_u, whole, tail);
        store_columns(grad_gates + D + d, grad_r, whole, tail);
        store_columns(grad_gates + 2 * D + d, grad_n, whole, tail);
      }
      if (k.grad_attention) assign(k.grad_attention[position], sum_lanes<T>(of_attention));
    }
    gemm<A>(3 * a.width, vecs, rows, {s.product, 1, ldp}, s.state, lds, s.grad_weight, lds, s.grad_weight,
            lds);
    gemm<A>(rows, vecs, 3 * a.width, {s.product, ldp, 1}, k.weight_rows, lds, s.grad_state, lds, s.grad_state,
            lds);
  }
}

#define RK_INSTANTIATE(T)                                                \
  template void augru<T>(Augru<T>, Range, AugruScratch<Accumulator<T>>); \
  template void augru_backward<T>(AugruBackward<T>, Range, AugruScratch<Accumulator<T>>);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
