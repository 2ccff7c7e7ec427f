// A layer of DCN v2 with experts of low rank, all of it, for one instruction set.
//
//   projections = x [V_1 .. V_E, gates]      m = mixed_experts(projections)         [B, E r + E], [B, E r]
//   product = m [U_1 .. U_E]^T + bias        out = x0 product + x                   [B, D]
//
//   grad_x0 = grad_out product       g = grad_out x0       grad_bias = sum_b g      grad_U = g^T m
//   grad_projections = mixed_experts_backward(g U)         grad_V = grad_projections^T x
//   grad_x = grad_projections V^T + grad_out
//
// Per sample: 2 D (2 E r + E) flops forward and twice that backward, the experts' beside; forward 2 D reads
// and 2 D + E r + E writes, backward 4 D + E r + E and 2 D. Bound by arithmetic: blocks of kMixtureRows
// samples go through both GEMMs, and into the sums of the weights' gradients, without leaving L2.
#pragma once

#include "cpu/interaction/mixed_experts_kernel.h"
#include "cpu/interaction/params.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/rows.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace mixture {

// Columns of a matrix, and how its rows lie in a block.
template <class A>
struct Columns {
  int64_t n, stride, vecs, tail;

  explicit RK_INLINE Columns(int64_t n)
      : n(n),
        stride(padded<A>(n)),
        vecs((n + Traits<A>::lanes - 1) / Traits<A>::lanes),
        tail(tail_width<A>(n)) {}
};

template <class A>
struct Widths {
  Columns<A> input, projections, experts;

  RK_INLINE Widths(int64_t D, int64_t E, int64_t rank)
      : input(D), projections(E * rank + E), experts(E * rank) {}
};

// to [rows, to_n] = from [rows, from_n] operand, plus init, one row for all.
template <class A>
RK_INLINE void multiply(int64_t rows, const A* from, const Columns<A>& from_n, const A* operand, A* to,
                        const Columns<A>& to_n, const A* init = nullptr) {
  gemm<A>(rows, to_n.vecs, from_n.n, {from, from_n.stride, 1}, operand, to_n.stride, to, to_n.stride, init, 0,
          to_n.tail);
}

// sum [a_n, b_n] += a^T b over the rows.
template <class A>
RK_INLINE void add_product(int64_t rows, const A* a, const Columns<A>& a_n, const A* b, const Columns<A>& b_n,
                           A* sum) {
  gemm<A>(a_n.n, b_n.vecs, rows, {a, 1, a_n.stride}, b, b_n.stride, sum, b_n.stride, sum, b_n.stride);
}

}  // namespace mixture

template <class T>
int64_t mixed_cross_layer_memory(int64_t D, int64_t E, int64_t rank) {
  const mixture::Widths<Accumulator<T>> w(D, E, rank);
  return kMixtureRows * (2 * w.input.stride + w.projections.stride + w.experts.stride);
}

template <class T>
void mixed_cross_layer(MixedCrossLayer<T> a, Range samples) {
  using namespace mixture;
  using A = Accumulator<T>;
  const Widths<A> w(a.D, a.experts.E, a.experts.rank);
  const int64_t columns = w.projections.n;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  const Tail<A> projections_tail(static_cast<int>(columns % Traits<A>::lanes));
  A *x = a.memory, *product = x + kMixtureRows * w.input.stride,
    *projections = product + kMixtureRows * w.input.stride,
    *mixed = projections + kMixtureRows * w.projections.stride;
  MixedExperts<A> experts = a.experts;
  experts.projections = projections;
  experts.stride_row = w.projections.stride;
  experts.out = mixed;
  experts.stride_out = w.experts.stride;
  for (int64_t b = samples.begin; b < samples.end; b += kMixtureRows) {
    const int64_t n = samples.end - b < kMixtureRows ? samples.end - b : kMixtureRows;
    for (int64_t i = 0; i < n; ++i)
      widen_row<T>(a.x + (b + i) * a.stride_x, x + i * w.input.stride, a.D, tail);
    multiply(n, x, w.input, a.v, projections, w.projections);
    for (int64_t i = 0; i < n; ++i)
      narrow_row<A>(projections + i * w.projections.stride, a.projections + (b + i) * columns, columns,
                    projections_tail);
    mixed_experts<A>(experts, {0, n});
    multiply(n, mixed, w.experts, a.u, product, w.input, a.bias);
    for (int64_t i = 0; i < n; ++i) {
      const A *xi = x + i * w.input.stride, *pi = product + i * w.input.stride;
      const T* x0 = a.x0 + (b + i) * a.stride_x0;
      const int64_t row = (b + i) * a.D;
      experts::for_each_vector<T>(a.D, [&](int64_t d, bool whole) __attribute__((always_inline)) {
        const auto p = Traits<A>::load(pi + d);
        store_columns(a.out + row + d, load_columns(x0 + d, whole, tail) * p + Traits<A>::load(xi + d), whole,
                      tail);
        if (a.product) store_columns(a.product + row + d, p, whole, tail);
      });
    }
  }
}

template <class T>
int64_t mixed_cross_layer_backward_memory(int64_t D, int64_t E, int64_t rank) {
  const mixture::Widths<Accumulator<T>> w(D, E, rank);
  return kMixtureRows * (3 * w.input.stride + w.projections.stride + 2 * w.experts.stride);
}

template <class T>
void mixed_cross_layer_backward(MixedCrossLayerBackward<T> a, Range samples) {
  using namespace mixture;
  using A = Accumulator<T>;
  using X = Traits<A>;
  const Widths<A> w(a.D, a.experts.E, a.experts.rank);
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  const int64_t block = kMixtureRows * w.input.stride;
  A *x = a.memory, *grad_product = x + block, *grad_x = grad_product + block,
    *grad_projections = grad_x + block, *grad_mixed = grad_projections + kMixtureRows * w.projections.stride,
    *mixed = grad_mixed + kMixtureRows * w.experts.stride;
  MixedExpertsBackward<A> experts{};
  experts.forward = a.experts;
  experts.forward.stride_row = w.projections.n;
  experts.forward.out = mixed;
  experts.forward.stride_out = w.experts.stride;
  experts.grad_out = grad_mixed;
  experts.stride_grad = w.experts.stride;
  experts.weight = a.weight;
  experts.grad_projections = grad_projections;
  experts.stride_projections = w.projections.stride;
  experts.grad_weight = a.sum_weight;
  for (int64_t b = samples.begin; b < samples.end; b += kMixtureRows) {
    const int64_t n = samples.end - b < kMixtureRows ? samples.end - b : kMixtureRows;
    for (int64_t i = 0; i < n; ++i) {
      widen_row<T>(a.x + (b + i) * a.stride_x, x + i * w.input.stride, a.D, tail);
      const T *grad_out = a.grad_out + (b + i) * a.stride_grad, *x0 = a.x0 + (b + i) * a.stride_x0;
      const int64_t row = (b + i) * a.D;
      A* to = grad_product + i * w.input.stride;
      experts::for_each_vector<T>(a.D, [&](int64_t d, bool whole) __attribute__((always_inline)) {
        const auto grad = load_columns(grad_out + d, whole, tail),
                   g = grad * load_columns(x0 + d, whole, tail);
        store_columns(a.grad_x0 + row + d, grad * load_columns(a.product + row + d, whole, tail), whole,
                      tail);
        X::store(to + d, g);
        X::store(a.sum_bias + d, X::load(a.sum_bias + d) + g);
      });
    }
    multiply(n, grad_product, w.input, a.u, grad_mixed, w.experts);
    experts.forward.projections = a.projections + b * w.projections.n;
    mixed_experts_backward<A>(experts, {0, n});
    add_product(n, grad_product, w.input, mixed, w.experts, a.sum_u);
    add_product(n, grad_projections, w.projections, x, w.input, a.sum_v);
    multiply(n, grad_projections, w.projections, a.v, grad_x, w.input);
    for (int64_t i = 0; i < n; ++i) {
      const T* grad_out = a.grad_out + (b + i) * a.stride_grad;
      T* to = a.grad_x + (b + i) * a.D;
      experts::for_each_vector<T>(a.D, [&](int64_t d, bool whole) __attribute__((always_inline)) {
        store_columns(to + d,
                      X::load(grad_x + i * w.input.stride + d) + load_columns(grad_out + d, whole, tail),
                      whole, tail);
      });
    }
  }
}

#define RK_INSTANTIATE(T)                                                           \
  template int64_t mixed_cross_layer_memory<T>(int64_t, int64_t, int64_t);          \
  template void mixed_cross_layer<T>(MixedCrossLayer<T>, Range);                    \
  template int64_t mixed_cross_layer_backward_memory<T>(int64_t, int64_t, int64_t); \
  template void mixed_cross_layer_backward<T>(MixedCrossLayerBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
