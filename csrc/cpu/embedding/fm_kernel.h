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
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

namespace fm {

// Sample by sample: every row is stored and combined while it is in a register. fm's sum has the order of
// fm_interaction_kernel.h with one chain: a sample's rows come no faster.
template <class I, class T>
static void look_up_rows(FmRows<T> a, Range samples) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t F = a.F, D = a.features[0].D, B = a.features[0].B;
  const int64_t ahead = (bags::kRowsAhead + F - 1) / F;  // samples
  const Tail<T> tail(static_cast<int>(D % kLanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const int64_t next = b + ahead < B ? b + ahead : b;
    V total = {}, dot = {};
    for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      V s[kVecs] = {}, y[kVecs] = {};
      for (int64_t f = 0; f < F; ++f) {
        const Bags& bag = a.features[f];
        const I* ids = static_cast<const I*>(bag.ids);
        const T *weight = static_cast<const T*>(bag.weight) + d, *row = weight + ids[b] * bag.stride_wr,
                *next_row = weight + ids[next] * bag.stride_wr;
        T* out = static_cast<T*>(bag.out) + b * bag.stride_ob + d;
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          __builtin_prefetch(next_row + v * kLanes);
          const V x = block.load(row, v, tail);
          block.store(out, v, x, tail);
          y[v] += x * s[v];
          s[v] += x;
          if (a.linear_weight) dot += x * block.load(a.linear_weight + f * D + d, v, tail);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) total += y[v] + (s[v] - s[v]);  // as fm_interaction_kernel.h
    });
    assign(a.fm[b], sum_lanes<T>(total));
    if (a.linear_weight) assign(a.linear[b], sum_lanes<T>(dot));
  }
}

}  // namespace fm

template <class T>
void embedding_fm_rows(FmRows<T> a, Range samples) {
  a.features[0].wide_ids ? fm::look_up_rows<int64_t>(a, samples) : fm::look_up_rows<int32_t>(a, samples);
}

template <class T>
void embedding_fm_backward(const FmGrads& g, Range samples, Accumulator<T>* grad_linear_weight) {
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const T *grad_embeddings = static_cast<const T*>(g.grad_embeddings),
          *a = static_cast<const T*>(g.linear_weight);
  const Tail<T> tail(static_cast<int>(g.D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(g.D % kLanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const T* x = static_cast<const T*>(g.embeddings) + b * g.stride_xb;
    T* grad_x = static_cast<T*>(g.grad_lookups) + b * g.F * g.D;
    const A grad_fm = g.grad_fm ? to_scalar(static_cast<const T*>(g.grad_fm)[b]) : A(0);
    const A grad_linear = a ? to_scalar(static_cast<const T*>(g.grad_linear)[b]) : A(0);
    for_each_column_block<T>(g.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      V s[kVecs], y[kVecs];
      fm::reduce(x + d, g.D, g.F, tail, block, s, y);
      for (int64_t f = 0; f < g.F; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int64_t i = f * g.D + d;
          const V xv = block.load(x + i, v, tail);
          V grad = grad_fm * (s[v] - xv);
          if (grad_embeddings) grad += block.load(grad_embeddings + b * g.stride_gb + i, v, tail);
          if (a) {
            grad += grad_linear * block.load(a + i, v, tail);
            A* sum = grad_linear_weight + i;
            block.store(sum, v, block.load(sum, v, tail_sum) + grad_linear * xv, tail_sum);
          }
          block.store(grad_x + i, v, grad, tail);
        }
    });
  }
}

template <class T>
void embedding_fm_sums(const FmGrads& g, Range samples, Accumulator<T>* grad_linear_weight) {
  using A = Accumulator<T>;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  A* grad_fm_s = static_cast<A*>(g.grad_fm_s);
  const Tail<T> tail(static_cast<int>(g.D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(g.D % kLanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const T* x = static_cast<const T*>(g.embeddings) + b * g.stride_xb;
    const A grad_fm = to_scalar(static_cast<const T*>(g.grad_fm)[b]);
    const A grad_linear = g.linear_weight ? to_scalar(static_cast<const T*>(g.grad_linear)[b]) : A(0);
    for_each_column_block<T>(g.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      V s[kVecs] = {};
      for (int64_t f = 0; f < g.F; ++f)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const int64_t i = f * g.D + d;
          const V xv = fm::load_first<decltype(block)>(x + i, v, tail);
          s[v] += xv;
          A* sum = grad_linear_weight + i;
          if (g.linear_weight) block.store(sum, v, block.load(sum, v, tail_sum) + grad_linear * xv, tail_sum);
        }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) block.store(grad_fm_s + b * g.D + d, v, grad_fm * s[v], tail_sum);
    });
  }
}

template <class T>
void embedding_fm_sum(const SumParts<T>& a) {
  for (int64_t k = 0; k < a.n; ++k) {
    Accumulator<T> sum = 0;
    for (int64_t i = 0; i < a.parts; ++i) sum += a.sums[i * a.n + k];
    assign(a.total[k], sum);
  }
}

#define RK_INSTANTIATE(T)                                                         \
  template void embedding_fm_rows<T>(FmRows<T>, Range);                           \
  template void embedding_fm_backward<T>(const FmGrads&, Range, Accumulator<T>*); \
  template void embedding_fm_sums<T>(const FmGrads&, Range, Accumulator<T>*);     \
  template void embedding_fm_sum(const SumParts<T>&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
