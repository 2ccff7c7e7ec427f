// FM second-order interaction, for one instruction set.
//
// x [B, F, D], one sample's fields x_1 .. x_F. With s_f = x_1 + .. + x_f,
//
//   out[b, d]     = 1/2 ((sum_f x_f)^2 - sum_f x_f^2) = sum_{f<g} x_f x_g = sum_f x_f s_{f-1}
//   grad_x[b,f,d] = grad_out[b, d] (s_F - x_f)
//
// and with reduce_sum out[b] = sum_d out[b, d]. The forward takes the last form: as many flops as the
// textbook's and no difference of two nearly equal numbers (a single field gives exactly 0). Two runs of
// fields with sums s, s' and interactions y, y' join to s + s' and y + y' + s s', so kChains runs go side by
// side to hide the add's latency.
//
// Per sample: F*D loads, 3 F*D flops forward; backward F*D loads, F*D stores, 3 F*D flops (s_F is recomputed
// from rows that stay in L1 for the second pass). Both are bound by memory, and a large grad_x is stored
// non-temporally: an ordinary store would load its lines too.
#pragma once

#include "cpu/dense/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/non_temporal.h"
#include "cpu/simd/vec.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace fm {

// A block's vector v, for the first read of x.
template <class Block, class T>
RK_INLINE typename Traits<T>::vec load_first(const T* p, int v, const Tail<T>& tail) {
  __builtin_prefetch(reinterpret_cast<const char*>(p + v * Traits<T>::lanes) + kFmAheadBytes);
  return Block::load(p, v, tail);
}

// Sum s and interaction y of a sample's columns [d, d + block): x at its first field.
template <class T, class Block, int kVecs>
RK_INLINE void reduce(const T* x, int64_t stride_field, int64_t F, const Tail<T>& tail, Block,
                      typename Traits<T>::vec (&s)[kVecs], typename Traits<T>::vec (&y)[kVecs]) {
  using V = typename Traits<T>::vec;
  constexpr int kChains = kVecs >= 4 ? 1 : 4 / kVecs;
  V s_[kChains][kVecs] = {}, y_[kChains][kVecs] = {};
  int64_t f = 0;
  for (; f + kChains <= F; f += kChains)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const V xv = load_first<Block>(x + (f + c) * stride_field, v, tail);
        y_[c][v] += xv * s_[c][v];
        s_[c][v] += xv;
      }
  for (; f < F; ++f)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const V xv = load_first<Block>(x + f * stride_field, v, tail);
      y_[0][v] += xv * s_[0][v];
      s_[0][v] += xv;
    }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    s[v] = s_[0][v];
    y[v] = y_[0][v];
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) {
      y[v] += y_[c][v] + s[v] * s_[c][v];
      s[v] += s_[c][v];
    }
    y[v] += s[v] - s[v];  // NaN where a field is infinite, as the difference of squares
  }
}

}  // namespace fm

template <class T>
void fm_interaction(FmInteraction<T> a, Range samples) {
  using V = typename Traits<T>::vec;
  const int64_t D = a.D;
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    V total = {};
    for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      V s[kVecs], y[kVecs];
      fm::reduce(a.x + b * a.stride_sample + d, a.stride_field, a.F, tail, block, s, y);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        if (a.reduce_sum)
          total += y[v];
        else
          block.store(a.out + b * D + d, v, y[v], tail);
      }
    });
    if (a.reduce_sum) assign(a.out[b], sum_lanes<T>(total));
  }
}

template <class T>
void fm_interaction_backward(FmInteractionBackward<T> a, Range samples) {
  using V = typename Traits<T>::vec;
  // Whole lines: those of a row, or of rows that are one block and so are written one after the other.
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t F = a.F, D = a.D;
  const bool non_temporal =
      a.non_temporal && D % kLanes == 0 && (D <= 4 * kLanes || D * sizeof(T) % kCacheLine == 0);
  const Tail<T> tail(static_cast<int>(D % kLanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const T *x = a.x + b * a.stride_sample, *g = a.grad_out + b * a.stride_grad;
    for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      V s[kVecs], y[kVecs], gv[kVecs];
      fm::reduce(x + d, a.stride_field, F, tail, block, s, y);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        gv[v] = a.reduce_sum ? splat<T>(to_scalar(*g)) : block.load(g + d, v, tail);
      for (int64_t f = 0; f < F; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const V grad = gv[v] * (s[v] - block.load(x + f * a.stride_field + d, v, tail));
          T* to = a.grad_x + (b * F + f) * D + d;
          if (non_temporal && !decltype(block)::tail)
            Traits<T>::store_non_temporal(to + v * kLanes, grad);
          else
            block.store(to, v, grad, tail);
        }
    });
  }
  if (non_temporal) fence_non_temporal();
}

#define RK_INSTANTIATE(T)                                   \
  template void fm_interaction<T>(FmInteraction<T>, Range); \
  template void fm_interaction_backward<T>(FmInteractionBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
