// Gradients of bags (lookup_kernel.h), for one instruction set; those of the rows are summed in
// segment_sum_kernel.h.
//
//   sum   grad e_{i_p} += w_p grad_out[b]      grad w_p = <grad_out[b], e_{i_p}>
//   mean  the same over n
//   max   grad e_{i_p, d} += grad_out[b, d] for the first p that attains the maximum or is NaN
#pragma once

#include "cpu/embedding/ids_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

namespace bags {

// The ids of bag b that are not padding.
template <class I>
RK_INLINE int64_t count(const Bags& f, const I* ids, int64_t b) {
  const int64_t p0 = f.begin(b), p1 = f.begin(b + 1);
  if (f.padding_idx < 0) return p1 - p0;
  int64_t n = 0;
  for (int64_t p = p0; p < p1; ++p) n += ids[p] != f.padding_idx;
  return n;
}

template <class T, class I>
static void max_grad_rows(const Bags& f, const I* ids, Range range, T* grad_rows) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(f.D % kLanes));
  for (int64_t b = range.begin; b < range.end; ++b)
    for (int64_t d = 0; d < f.D; d += kLanes) {
      const bool whole = d + kLanes <= f.D;
      const auto row = [&](int64_t p) __attribute__((always_inline)) {
        return load_columns(static_cast<const T*>(f.weight) + ids[p] * f.stride_wr + d, whole, tail);
      };
      V peak = {};
      bool empty = true;
      for (int64_t p = f.begin(b); p < f.begin(b + 1); ++p) {
        if (ids[p] == f.padding_idx) continue;
        const V x = row(p);
        peak = empty ? x : (x > peak) | (x != x) ? x : peak;
        empty = false;
      }
      V grad = load_columns(static_cast<const T*>(f.out) + b * f.stride_ob + d, whole, tail);
      for (int64_t p = f.begin(b); p < f.begin(b + 1); ++p) {
        if (ids[p] == f.padding_idx) continue;
        const V x = row(p);
        const auto attained = (x == peak) | (x != x);  // beside a NaN no other value is the largest
        store_columns(grad_rows + p * f.D + d, attained ? grad : V{}, whole, tail);
        grad = attained ? V{} : grad;
      }
    }
}

template <class T, class I>
static void factor_grad(const Bags& f, const I* ids, Range range, T* grad_factors) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(f.D % kLanes));
  for (int64_t b = range.begin; b < range.end; ++b) {
    const int64_t n = f.mode == kMean ? count(f, ids, b) : 1;
    const T* grad = static_cast<const T*>(f.out) + b * f.stride_ob;
    for (int64_t p = f.begin(b); p < f.begin(b + 1); ++p) {
      const T* row = static_cast<const T*>(f.weight) + ids[p] * f.stride_wr;
      V product = {};
      if (ids[p] != f.padding_idx)
        for (int64_t d = 0; d < f.D; d += kLanes) {
          const bool whole = d + kLanes <= f.D;
          product += load_columns(grad + d, whole, tail) * load_columns(row + d, whole, tail);
        }
      const A dot = sum_lanes<T>(product);
      assign(grad_factors[p], n > 1 ? dot / A(n) : dot);
    }
  }
}

}  // namespace bags

template <class T>
void embedding_max_grad_rows(const Bags& f, Range range, T* grad_rows) {
  with_ids(f, [&](const auto* ids) { bags::max_grad_rows(f, ids, range, grad_rows); });
}
template <class T>
void embedding_factor_grad(const Bags& f, Range range, T* grad_factors) {
  with_ids(f, [&](const auto* ids) { bags::factor_grad(f, ids, range, grad_factors); });
}

#define RK_INSTANTIATE(T)                                           \
  template void embedding_max_grad_rows<T>(const Bags&, Range, T*); \
  template void embedding_factor_grad<T>(const Bags&, Range, T*);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
