// Attention by dot products of a few queries to one history, for one instruction set.
//
// Queries q_c [D], scaled already, and rows x_l [D] that are keys and values both:
//
//   s_lc = <q_c, x_l>      w_lc = exp(s_lc - m_c) / sum_l exp(s_lc - m_c)      out_c = sum_l w_lc x_l
//
// A row that is not valid scores -1e9: it weighs nothing beside a valid one, and as much as the others where
// there is none. Backward, g_c = dL/dout_c:
//
//   ds_lc = w_lc (<g_c, x_l> - <g_c, out_c>), zero where l is not valid
//   dx_l  = sum_c w_lc g_c + ds_lc q_c          dq_c = sum_l ds_lc x_l
//
// A row and query need 4 D flops forward and 10 D backward; a row is read once, whatever the queries, and in
// the backward its gradient written. Scores never exist but for a block of rows: the highest score and the
// sum so far are kept, and what is pooled is scaled where a block has a higher one (Milakov and Gimelshein
// 2018).
//
// Many queries are the columns of a GEMM, few are in few_queries_kernel.h.
#pragma once

#include "cpu/simd/columns.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/rows.h"
#include "cpu/target_attention/few_queries_kernel.h"
#include "cpu/target_attention/rows_kernel.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace target {

// columns [D, ld_queries] of rows [queries, padded(D)], as far as the GEMM reads them.
template <class T>
RK_INLINE void to_columns(const TargetAttention<T>& a, const Accumulator<T>* rows, Accumulator<T>* columns) {
  using A = Accumulator<T>;
  for (int64_t d = 0; d < a.D; ++d)
    for (int64_t c = 0; c < a.ld_queries; ++c)
      columns[d * a.ld_queries + c] = c < a.queries ? rows[c * padded<A>(a.D) + d] : 0;
}

// product [n, ld_queries] = rows [n, padded(D)] times `columns`.
template <class T>
RK_INLINE void multiply(const TargetAttention<T>& a, int64_t n, const Accumulator<T>* rows,
                        const Accumulator<T>* columns, Accumulator<T>* product) {
  using A = Accumulator<T>;
  gemm<A>(n, (a.queries + Traits<A>::lanes - 1) / Traits<A>::lanes, a.D, {rows, padded<A>(a.D), 1}, columns,
          a.ld_queries, product, a.ld_queries, nullptr, 0);
}
// to [M, D] += from [M, K] other [K, D], with so many values from one row of each to the next.
template <class T>
RK_INLINE void add_product(int64_t M, int64_t K, Operand<Accumulator<T>> from, const Accumulator<T>* other,
                           Accumulator<T>* to, int64_t D) {
  using A = Accumulator<T>;
  const int64_t ld = padded<A>(D);
  gemm<A>(M, (D + Traits<A>::lanes - 1) / Traits<A>::lanes, K, from, other, ld, to, ld, to, ld);
}

template <class T>
RK_INLINE void attend(const TargetAttention<T>& a, Range rows, const TargetScratch<Accumulator<T>>& s) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t ld = padded<A>(a.D), ldq = a.ld_queries;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  to_columns(a, a.query, s.query_columns);
  for (int64_t c = 0; c < ldq; ++c) {
    a.highest[c] = kLowest<A>;
    a.inverse[c] = 0;  // the sum, up to the end
  }
  for (int64_t begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const int64_t n = rows.end - begin < kBlockRows ? rows.end - begin : kBlockRows;
    load_block(a, begin, n, tail, s.rows);
    multiply(a, n, s.rows, s.query_columns, s.weight);
    hide(a, begin, n, s.weight, ldq, kHidden);
    for (int64_t c = 0; c < a.queries; c += X::lanes) {
      const V before = X::load(a.highest + c);
      V highest = before, sum = {};
      for (int64_t i = 0; i < n; ++i) {
        const V score = X::load(s.weight + i * ldq + c);
        highest = score > highest ? score : highest;
      }
      for (int64_t i = 0; i < n; ++i) {
        const V weight = weight_of(X::load(s.weight + i * ldq + c) - highest);
        X::store(s.weight + i * ldq + c, weight);
        sum += weight;
      }
      const V scale = weight_of(before - highest);
      X::store(a.highest + c, highest);
      X::store(a.inverse + c, X::load(a.inverse + c) * scale + sum);
      for (int64_t j = 0; j < X::lanes && c + j < a.queries; ++j)
        if (scale[j] != 1)
          for (int64_t d = 0; d < a.D; d += X::lanes)
            X::store(a.pooled + (c + j) * ld + d, scale[j] * X::load(a.pooled + (c + j) * ld + d));
    }
    add_product<T>(a.queries, n, {s.weight, 1, ldq}, s.rows, a.pooled, a.D);
  }
  for (int64_t c = 0; c < a.queries; ++c) {
    a.inverse[c] = rows.begin < rows.end ? 1 / a.inverse[c] : 0;
    for (int64_t d = 0; d < a.D; d += X::lanes)
      X::store(a.pooled + c * ld + d, a.inverse[c] * X::load(a.pooled + c * ld + d));
  }
}

template <class T>
RK_INLINE void attend_backward(const TargetAttentionBackward<T>& k, Range rows,
                               const TargetScratch<Accumulator<T>>& s) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  using V = typename X::vec;
  const TargetAttention<T>& a = k.forward;
  const int64_t ld = padded<A>(a.D), ldq = a.ld_queries;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  to_columns(a, a.query, s.query_columns);
  to_columns(a, k.grad_out, s.grad_columns);
  for (int64_t begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const int64_t n = rows.end - begin < kBlockRows ? rows.end - begin : kBlockRows;
    load_block(a, begin, n, tail, s.rows);
    multiply(a, n, s.rows, s.query_columns, s.weight);
    hide(a, begin, n, s.weight, ldq, kHidden);
    multiply(a, n, s.rows, s.grad_columns, s.grad_score);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < a.queries; c += X::lanes) {
        A *weight = s.weight + i * ldq + c, *grad = s.grad_score + i * ldq + c;
        const V w = weight_of(X::load(weight) - X::load(a.highest + c)) * X::load(a.inverse + c);
        X::store(weight, w);
        X::store(grad, w * (X::load(grad) - X::load(k.along + c)));
      }
    }
    hide(a, begin, n, s.grad_score, ldq, 0);
    __builtin_memset(s.grad, 0, n * ld * sizeof(A));
    add_product<T>(n, a.queries, {s.weight, ldq, 1}, k.grad_out, s.grad, a.D);
    add_product<T>(n, a.queries, {s.grad_score, ldq, 1}, a.query, s.grad, a.D);
    add_product<T>(a.queries, n, {s.grad_score, 1, ldq}, s.rows, k.grad_query, a.D);
    for (int64_t i = 0; i < n; ++i)
      narrow_row(s.grad + i * ld, k.grad_history + (begin + i) * a.D, a.D, tail);
  }
}

}  // namespace target

template <class T>
void target_attention(TargetAttention<T> a, Range rows, TargetScratch<Accumulator<T>> s) {
  using namespace target;
  with_few<Accumulator<T>>(
      a.queries,
      [&](auto q) __attribute__((always_inline)) { attend_few<T, decltype(q)::value>(a, rows, s); },
      [&]() __attribute__((always_inline)) { attend(a, rows, s); });
}

template <class T>
void target_attention_backward(TargetAttentionBackward<T> k, Range rows, TargetScratch<Accumulator<T>> s) {
  using namespace target;
  with_few<Accumulator<T>>(
      k.forward.queries,
      [&](auto q) __attribute__((always_inline)) { attend_few_backward<T, decltype(q)::value>(k, rows, s); },
      [&]() __attribute__((always_inline)) { attend_backward(k, rows, s); });
}

#define RK_INSTANTIATE(T)                                                                      \
  template void target_attention<T>(TargetAttention<T>, Range, TargetScratch<Accumulator<T>>); \
  template void target_attention_backward<T>(TargetAttentionBackward<T>, Range,                \
                                             TargetScratch<Accumulator<T>>);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
