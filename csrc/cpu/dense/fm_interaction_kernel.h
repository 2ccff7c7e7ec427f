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
// from rows that stay in the first-level cache for the second pass). Both are bound by memory, and a large
// grad_x is stored past the caches: an ordinary store would load its lines too.
#pragma once

#include "cpu/simd/columns.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace fm {

// How far ahead the first read of x asks for its rows. The short sums of every sample keep too few loads in
// flight for the memory's latency, and the hardware's own prefetch stops at each page: without this a large x
// is read at half the bandwidth (Zen 5). Beyond 4 KiB the next page's translation is under way too.
constexpr int64_t kPrefetchBytes = 5120;

// One sample's columns [0, kVecs * lanes - (kTail: the absent lanes)): sum s and interaction y.
template <class T, int kVecs, bool kTail>
struct Columns {
  using V = typename Traits<T>::vec;
  static constexpr int kChains = kVecs >= 4 ? 1 : 4 / kVecs;

  RK_INLINE V load(const T* p, int v, const Tail<T>& tail) {
    return kTail && v == kVecs - 1 ? tail.load(p + v * Traits<T>::lanes)
                                   : Traits<T>::load(p + v * Traits<T>::lanes);
  }

  // As load, for the first read of x.
  RK_INLINE V load_once(const T* p, int v, const Tail<T>& tail) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + v * Traits<T>::lanes) + kPrefetchBytes);
    return load(p, v, tail);
  }

  RK_INLINE void reduce(const T* x, int64_t stride_xf, int64_t F, const Tail<T>& tail, V (&s)[kVecs],
                        V (&y)[kVecs]) {
    V s_[kChains][kVecs] = {}, y_[kChains][kVecs] = {};
    int64_t f = 0;
    for (; f + kChains <= F; f += kChains)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const V xv = load_once(x + (f + c) * stride_xf, v, tail);
          y_[c][v] += xv * s_[c][v];
          s_[c][v] += xv;
        }
    for (; f < F; ++f)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const V xv = load_once(x + f * stride_xf, v, tail);
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
};

}  // namespace fm

// Samples [b0, b1). x has unit stride along D; out is contiguous, [B] when reduce_sum and [B, D] otherwise.
template <class T>
void fm_interaction(const T* x, int64_t stride_xb, int64_t stride_xf, T* out, int64_t b0, int64_t b1,
                    int64_t F, int64_t D, bool reduce_sum) {
  using V = typename Traits<T>::vec;
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = b0; b < b1; ++b) {
    V total = {};
    for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      V s[kVecs], y[kVecs];
      fm::Columns<T, kVecs, decltype(block)::tail>::reduce(x + b * stride_xb + d, stride_xf, F, tail, s, y);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        T* p = out + b * D + d + v * Traits<T>::lanes;
        if (reduce_sum)
          total += y[v];
        else if (decltype(block)::tail && v == kVecs - 1)
          tail.store(p, y[v]);
        else
          Traits<T>::store(p, y[v]);
      }
    });
    if (reduce_sum) assign(out[b], sum_lanes<T>(total));
  }
}

// grad_x is contiguous, and past the caches if `streamed`; grad_out is [B] (stride_gb) when reduce_sum and
// [B, D] with unit stride along D otherwise.
template <class T>
void fm_interaction_backward(const T* grad_out, int64_t stride_gb, const T* x, int64_t stride_xb,
                             int64_t stride_xf, T* grad_x, int64_t b0, int64_t b1, int64_t F, int64_t D,
                             bool reduce_sum, bool streamed) {
  using V = typename Traits<T>::vec;
  // Whole lines: those of a row, or of rows that are one block and so are written one after the other.
  constexpr int64_t kLanes = Traits<T>::lanes;
  streamed &= D % kLanes == 0 && (D <= 4 * kLanes || D * sizeof(T) % kCacheLine == 0);
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = b0; b < b1; ++b) {
    const T* g = grad_out + b * stride_gb;
    for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      using C = fm::Columns<T, kVecs, decltype(block)::tail>;
      V s[kVecs], y[kVecs], gv[kVecs];
      C::reduce(x + b * stride_xb + d, stride_xf, F, tail, s, y);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) gv[v] = reduce_sum ? splat<T>(to_scalar(*g)) : C::load(g + d, v, tail);
      for (int64_t f = 0; f < F; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const V grad = gv[v] * (s[v] - C::load(x + b * stride_xb + f * stride_xf + d, v, tail));
          T* p = grad_x + (b * F + f) * D + d + v * Traits<T>::lanes;
          if (decltype(block)::tail && v == kVecs - 1)
            tail.store(p, grad);
          else if (streamed)
            Traits<T>::stream(p, grad);
          else
            Traits<T>::store(p, grad);
        }
    });
  }
  if (streamed) end_of_stream();
}

#define RK_INSTANTIATE(T)                                                                                    \
  template void fm_interaction<T>(const T*, int64_t, int64_t, T*, int64_t, int64_t, int64_t, int64_t, bool); \
  template void fm_interaction_backward<T>(const T*, int64_t, const T*, int64_t, int64_t, T*, int64_t,       \
                                           int64_t, int64_t, int64_t, bool, bool);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
