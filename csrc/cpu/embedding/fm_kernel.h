// The FM and the linear term of embeddings, for one instruction set.
//
// x [B, F, D], the embeddings of a sample's features side by side, and a [F, D], the linear term's weights:
//
//   fm[b]     = sum_{f<g} <x_f, x_g>                                          (fm_interaction_kernel.h)
//   linear[b] = sum_f <a_f, x_f>
//
//   grad_x[b, f] = grad_embeddings[b, f] + grad_fm[b] (s - x_f) + grad_linear[b] a_f,     s = sum_f x_f
//   grad_a[f]    = sum_b grad_linear[b] x_f
//
// Per sample, forward: 5 F D flops on rows that their lookup has just left in the cache; backward: F D loads
// of x and of grad_embeddings, F D stores, 8 F D flops, bound by memory. Where x_f are the tables' rows as
// they are, grad_x is not stored: the sums over a row's lookups (segment_sum_kernel.h, FmPart) need of x
// only s and grad_a, F D loads.
#pragma once

#include "cpu/dense/fm_interaction_kernel.h"
#include "cpu/embedding/lookup_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// Samples [b0, b1) of features of one id a sample, without factors or padding, sample by sample: every row is
// stored and combined while it is in a register. The order of fm's sum is that of fm_interaction_kernel.h
// with one chain: a sample's rows come no faster. `linear` and a may be null.
template <class I, class T>
void embedding_fm_rows(const Bags* features, int64_t F, const T* a, T* fm, T* linear, int64_t b0,
                       int64_t b1) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t D = features[0].D, B = features[0].B;
  const int64_t ahead = (bags::kAhead + F - 1) / F;  // samples
  const Tail<T> tail(static_cast<int>(D % kLanes));
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t next = b + ahead < B ? b + ahead : b;
    V total = {}, dot = {};
    for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      constexpr bool kTail = decltype(block)::tail;
      V s[kVecs] = {}, y[kVecs] = {};
      for (int64_t f = 0; f < F; ++f) {
        const Bags& bag = features[f];
        const I* ids = static_cast<const I*>(bag.ids);
        const T *weight = static_cast<const T*>(bag.weight) + d, *row = weight + ids[b] * bag.stride_wr,
                *asked = weight + ids[next] * bag.stride_wr;
        T* out = static_cast<T*>(bag.out) + b * bag.stride_ob + d;
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const bool last = v == kVecs - 1;
          __builtin_prefetch(asked + v * kLanes);
          const V x = bags::load<T, kTail>(row + v * kLanes, last, tail);
          bags::store<T, kTail>(out + v * kLanes, x, last, tail);
          y[v] += x * s[v];
          s[v] += x;
          if (a) dot += x * bags::load<T, kTail>(a + f * D + d + v * kLanes, last, tail);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total += y[v] + (s[v] - s[v]);  // as fm_interaction_kernel.h
    });
    assign(fm[b], sum_lanes<T>(total));
    if (a) assign(linear[b], sum_lanes<T>(dot));
  }
}

// Samples [b0, b1); their part of grad_a, if any, is added to `grad_linear_weight` [F, D].
template <class T, class A>
void embedding_fm_backward(const FmGrads& g, int64_t b0, int64_t b1, A* grad_linear_weight) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const T *grad_embeddings = static_cast<const T*>(g.grad_embeddings),
          *a = static_cast<const T*>(g.linear_weight);
  const Tail<T> tail(static_cast<int>(g.D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(g.D % kLanes));
  for (int64_t b = b0; b < b1; ++b) {
    const T* x = static_cast<const T*>(g.embeddings) + b * g.stride_xb;
    T* grad_x = static_cast<T*>(g.grad_lookups) + b * g.F * g.D;
    const A grad_fm = g.grad_fm ? to_scalar(static_cast<const T*>(g.grad_fm)[b]) : A(0);
    const A grad_linear = a ? to_scalar(static_cast<const T*>(g.grad_linear)[b]) : A(0);
    for_each_column_block<T>(g.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      constexpr bool kTail = decltype(block)::tail;
      using C = fm::Columns<T, kVecs, kTail>;
      V s[kVecs], y[kVecs];
      C::reduce(x + d, g.D, g.F, tail, s, y);
      for (int64_t f = 0; f < g.F; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int64_t i = f * g.D + d;
          const V xv = C::load(x + i, v, tail);
          V grad = grad_fm * (s[v] - xv);
          if (grad_embeddings) grad += C::load(grad_embeddings + b * g.stride_gb + i, v, tail);
          if (a) {
            grad += grad_linear * C::load(a + i, v, tail);
            A* sum = grad_linear_weight + i + v * kLanes;
            if (kTail && v == kVecs - 1)
              tail_sum.store(sum, tail_sum.load(sum) + grad_linear * xv);
            else
              Traits<A>::store(sum, Traits<A>::load(sum) + grad_linear * xv);
          }
          if (kTail && v == kVecs - 1)
            tail.store(grad_x + i + v * kLanes, grad);
          else
            Traits<T>::store(grad_x + i + v * kLanes, grad);
        }
    });
  }
}

// Of samples [b0, b1) what an FmPart and grad_a need: grad_fm_s [B, D] = grad_fm s; the part of grad_a, if
// any, is added to `grad_linear_weight` [F, D].
template <class T, class A>
void embedding_fm_sums(const FmGrads& g, int64_t b0, int64_t b1, A* grad_fm_s, A* grad_linear_weight) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(g.D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(g.D % kLanes));
  for (int64_t b = b0; b < b1; ++b) {
    const T* x = static_cast<const T*>(g.embeddings) + b * g.stride_xb;
    const A grad_fm = to_scalar(static_cast<const T*>(g.grad_fm)[b]);
    const A grad_linear = g.linear_weight ? to_scalar(static_cast<const T*>(g.grad_linear)[b]) : A(0);
    for_each_column_block<T>(g.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      constexpr bool kTail = decltype(block)::tail;
      using C = fm::Columns<T, kVecs, kTail>;
      const auto add = [&](A* sum, V v, bool last) __attribute__((always_inline)) {
        if (last)
          tail_sum.store(sum, tail_sum.load(sum) + v);
        else
          Traits<A>::store(sum, Traits<A>::load(sum) + v);
      };
      V s[kVecs] = {};
      for (int64_t f = 0; f < g.F; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int64_t i = f * g.D + d;
          const V xv = C::load_once(x + i, v, tail);
          s[v] += xv;
          if (g.linear_weight)
            add(grad_linear_weight + i + v * kLanes, grad_linear * xv, kTail && v == kVecs - 1);
        }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        A* p = grad_fm_s + b * g.D + d + v * kLanes;
        if (kTail && v == kVecs - 1)
          tail_sum.store(p, grad_fm * s[v]);
        else
          Traits<A>::store(p, grad_fm * s[v]);
      }
    });
  }
}

// total [n] = the sum of `parts` rows of n values.
template <class T, class A>
void embedding_fm_sum(const A* sums, int64_t parts, int64_t n, T* total) {
  for (int64_t k = 0; k < n; ++k) {
    A sum = 0;
    for (int64_t i = 0; i < parts; ++i) sum += sums[i * n + k];
    assign(total[k], sum);
  }
}

#define RK_INSTANTIATE_ROWS(T, I) \
  template void embedding_fm_rows<I, T>(const Bags*, int64_t, const T*, T*, T*, int64_t, int64_t);
#define RK_INSTANTIATE(T)                                                                        \
  RK_INSTANTIATE_ROWS(T, int32_t)                                                                \
  RK_INSTANTIATE_ROWS(T, int64_t)                                                                \
  template void embedding_fm_backward<T, Traits<T>::scalar>(const FmGrads&, int64_t, int64_t,    \
                                                            Traits<T>::scalar*);                 \
  template void embedding_fm_sums<T, Traits<T>::scalar>(const FmGrads&, int64_t, int64_t,        \
                                                        Traits<T>::scalar*, Traits<T>::scalar*); \
  template void embedding_fm_sum(const Traits<T>::scalar*, int64_t, int64_t, T*);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE
#undef RK_INSTANTIATE_ROWS

}  // namespace RK_ISA
}  // namespace rk
