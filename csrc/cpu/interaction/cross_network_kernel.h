// DCN's cross network, all layers in one pass, for one instruction set.
//
//   x_{l+1} = x_0 (w_l . x_l) + b_l + x_l
//
// Every layer's output is a multiple of x_0 and a vector that all rows share, x_l = alpha_l x_0 + beta_l:
//
//   p_l = w_l . x_0     beta_{l+1} = beta_l + b_l     c_l = w_l . beta_l     alpha_0 = 1, beta_0 = 0
//   alpha_{l+1} = alpha_l (1 + p_l) + c_l             out = alpha_L x_0 + beta_L
//
// Backward, with g = dL/dout of a row and a_l = dL/dalpha_l:
//
//   a_L = g . x_0     a_l = a_{l+1} (1 + p_l)     dL/dp_l = a_{l+1} alpha_l     dL/dc_l = a_{l+1}
//   dL/dx_0 = alpha_L g + sum_l dL/dp_l w_l       dL/dw_l = sum_rows dL/dp_l x_0 + beta_l sum_rows dL/dc_l
//
// and the biases' from the sum of g and from dL/dc_l w_l (cross_network.cpp). Per row of D values and L
// layers: forward one read, one write, (2 L + 2) D flops; backward two reads, one write, (4 L + 4) D flops.
// Bound by memory up to some ten layers.
#pragma once

#include "cpu/interaction/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace cross {

constexpr int kRows = 4;  // at a time: a vector of weights is loaded once for all of them

// Calls body(first column, load) for each vector of columns.
template <class T, class Body>
RK_INLINE void for_each_vector(int64_t D, const Tail<T>& tail, const Body& body) {
  int64_t d = 0;
  for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
    body(
        d, [](const T* p) __attribute__((always_inline)) { return Traits<T>::load(p); },
        [](T* p, typename Traits<T>::vec v) __attribute__((always_inline)) { Traits<T>::store(p, v); });
  if (d < D)
    body(
        d, [&](const T* p) __attribute__((always_inline)) { return tail.load(p); },
        [&](T* p, typename Traits<T>::vec v) __attribute__((always_inline)) { tail.store(p, v); });
}

// p [n rows, layers] = x [n, D] weights^T for layers [l, l + kLayers).
template <class T, int n, int kLayers>
RK_INLINE void project(const CrossLayers<Accumulator<T>>& layers, int64_t l, const T* x, int64_t stride_row,
                       const Tail<T>& tail, Accumulator<T>* p) {
  using V = typename Traits<T>::vec;
  const Accumulator<T>* weights = layers.weights + l * layers.stride;
  V sums[n][kLayers] = {};
  for_each_vector<T>(layers.D, tail, [&](int64_t d, auto load, auto) __attribute__((always_inline)) {
    V xv[n];
#pragma GCC unroll 4
    for (int r = 0; r < n; ++r) xv[r] = load(x + r * stride_row + d);
#pragma GCC unroll 2
    for (int k = 0; k < kLayers; ++k) {
      const V w = Traits<Accumulator<T>>::load(weights + k * layers.stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < n; ++r) sums[r][k] += xv[r] * w;
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < n; ++r)
#pragma GCC unroll 2
    for (int k = 0; k < kLayers; ++k) p[r * layers.layers + l + k] = sum_lanes<Accumulator<T>>(sums[r][k]);
}

template <class T, int n>
RK_INLINE void forward_rows(const CrossNetwork<T>& a, int64_t row, const Tail<T>& tail) {
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  const int64_t L = a.layers.layers, D = a.layers.D;
  const T* x = a.x + row * a.stride_row;
  A* p = a.projections + row * L;
  int64_t l = 0;
  for (; l + 2 <= L; l += 2) project<T, n, 2>(a.layers, l, x, a.stride_row, tail, p);
  if (l < L) project<T, n, 1>(a.layers, l, x, a.stride_row, tail, p);
  V alpha[n];
#pragma GCC unroll 4
  for (int r = 0; r < n; ++r) {
    A alpha_l = 1;
    for (l = 0; l < L; ++l) alpha_l += alpha_l * p[r * L + l] + a.layers.constants[l];
    alpha[r] = splat<A>(alpha_l);
  }
  T* out = a.out + row * D;
  for_each_vector<T>(D, tail, [&](int64_t d, auto load, auto store) __attribute__((always_inline)) {
    const V beta = Traits<A>::load(a.layers.beta + d);
#pragma GCC unroll 4
    for (int r = 0; r < n; ++r) store(out + r * D + d, alpha[r] * load(x + r * a.stride_row + d) + beta);
  });
}

// dp [layers, n] of n rows, from their dots g . x; returns each row's alpha_L. `alphas` is of n layers.
template <class A, int n>
RK_INLINE void recur(const CrossLayers<A>& layers, const A* p, const A (&dots)[n], A* dp, A* alphas,
                     A* sum_constants, A (&alpha)[n]) {
  const int64_t L = layers.layers;
#pragma GCC unroll 4
  for (int r = 0; r < n; ++r) {
    A alpha_l = 1, a = dots[r];
    for (int64_t l = 0; l < L; ++l) {
      alphas[l] = alpha_l;
      alpha_l += alpha_l * p[r * L + l] + layers.constants[l];
    }
    alpha[r] = alpha_l;
    for (int64_t l = L - 1; l >= 0; --l) {
      dp[l * n + r] = a * alphas[l];
      sum_constants[l] += a;
      a += a * p[r * L + l];
    }
  }
}

template <class T, int n>
RK_INLINE void backward_rows(const CrossNetworkBackward<T>& a, int64_t row, const Tail<T>& tail) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  using V = typename Traits<T>::vec;
  const int64_t L = a.layers.layers, D = a.layers.D, stride = a.layers.stride;
  const T *x = a.x + row * a.stride_row, *g = a.grad_out + row * a.stride_grad;
  V products[n] = {};
  for_each_vector<T>(D, tail, [&](int64_t d, auto load, auto) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < n; ++r)
      products[r] += load(g + r * a.stride_grad + d) * load(x + r * a.stride_row + d);
  });
  A dots[n], alpha[n], *dp = a.memory;
#pragma GCC unroll 4
  for (int r = 0; r < n; ++r) dots[r] = sum_lanes<A>(products[r]);
  recur<A, n>(a.layers, a.projections + row * L, dots, dp, a.memory + n * L, a.sum_constants, alpha);
  T* grad_x = a.grad_x + row * D;
  for_each_vector<T>(D, tail, [&](int64_t d, auto load, auto store) __attribute__((always_inline)) {
    V xv[n], dx[n], sum = X::load(a.sum_out + d);
#pragma GCC unroll 4
    for (int r = 0; r < n; ++r) {
      const V gv = load(g + r * a.stride_grad + d);
      xv[r] = load(x + r * a.stride_row + d);
      dx[r] = splat<A>(alpha[r]) * gv;
      sum += gv;
    }
    X::store(a.sum_out + d, sum);
    for (int64_t l = 0; l < L; ++l) {
      const V w = X::load(a.layers.weights + l * stride + d);
      V dw = X::load(a.sum_weights + l * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < n; ++r) {
        const V factor = splat<A>(dp[l * n + r]);
        dx[r] += factor * w;
        dw += factor * xv[r];
      }
      X::store(a.sum_weights + l * stride + d, dw);
    }
#pragma GCC unroll 4
    for (int r = 0; r < n; ++r) store(grad_x + r * D + d, dx[r]);
  });
}

}  // namespace cross

template <class T>
void cross_network(CrossNetwork<T> a, Range rows) {
  const Tail<T> tail(static_cast<int>(a.layers.D % Traits<T>::lanes));
  int64_t row = rows.begin;
  for (; row + cross::kRows <= rows.end; row += cross::kRows)
    cross::forward_rows<T, cross::kRows>(a, row, tail);
  for (; row < rows.end; ++row) cross::forward_rows<T, 1>(a, row, tail);
}

template <class T>
void cross_network_backward(CrossNetworkBackward<T> a, Range rows) {
  const Tail<T> tail(static_cast<int>(a.layers.D % Traits<T>::lanes));
  int64_t row = rows.begin;
  for (; row + cross::kRows <= rows.end; row += cross::kRows)
    cross::backward_rows<T, cross::kRows>(a, row, tail);
  for (; row < rows.end; ++row) cross::backward_rows<T, 1>(a, row, tail);
}

#define RK_INSTANTIATE(T)                                 \
  template void cross_network<T>(CrossNetwork<T>, Range); \
  template void cross_network_backward<T>(CrossNetworkBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
