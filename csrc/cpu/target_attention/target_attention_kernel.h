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
// Many queries are the columns of a GEMM. Of few, which would leave most lanes empty, a vector has the scores
// of several rows, [rows, queries]: a product along D and its share of a sum over lanes each, with 16 lanes
// D / 16 + 3 operations instead of D.
#pragma once

#include "cpu/simd/columns.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"
#include "cpu/target_attention/params.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace target {

constexpr float kHidden = -1e9f, kLowest = -3e38f;

// e^x of x <= 0, and exactly zero where that weighs nothing beside 1.
template <class V>
RK_INLINE V weight_of(V x) {
  return x < -87 ? V{} : exp(x);
}

template <class T>
RK_INLINE bool is_hidden(const TargetAttention<T>& a, int64_t row) {
  return a.valid && !a.valid[row * a.stride_valid];
}

// scores [n, ld] of rows that are not valid.
template <class T>
RK_INLINE void hide(const TargetAttention<T>& a, int64_t begin, int64_t n, Accumulator<T>* scores, int64_t ld,
                    float hidden) {
  if (!a.valid) return;
  for (int64_t i = 0; i < n; ++i)
    if (is_hidden(a, begin + i))
      for (int64_t c = 0; c < ld; ++c) scores[i * ld + c] = hidden;
}

// ---- many queries

// columns [D, ld_queries] of rows [queries, padded(D)], as far as the GEMM reads them.
template <class T>
RK_INLINE void to_columns(const TargetAttention<T>& a, const Accumulator<T>* rows, Accumulator<T>* columns) {
  using A = Accumulator<T>;
  for (int64_t d = 0; d < a.D; ++d)
    for (int64_t c = 0; c < a.ld_queries; ++c)
      columns[d * a.ld_queries + c] = c < a.queries ? rows[c * padded<A>(a.D) + d] : 0;
}

// Rows [begin, begin + n) as accumulators, and product [n, ld_queries] = their products with `columns`.
template <class T>
RK_INLINE void load_block(const TargetAttention<T>& a, int64_t begin, int64_t n, const Tail<T>& tail,
                          Accumulator<T>* rows) {
  for (int64_t i = 0; i < n; ++i)
    widen_row(a.rows + (begin + i) * a.stride_row, rows + i * padded<Accumulator<T>>(a.D), a.D, tail);
}
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
    a.highest[c] = kLowest;
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
      const A differentiable = is_hidden(a, begin + i) ? 0 : 1;
      for (int64_t c = 0; c < a.queries; c += X::lanes) {
        A *weight = s.weight + i * ldq + c, *grad = s.grad_score + i * ldq + c;
        const V w = weight_of(X::load(weight) - X::load(a.highest + c)) * X::load(a.inverse + c);
        X::store(weight, w);
        X::store(grad, differentiable * w * (X::load(grad) - X::load(k.along + c)));
      }
    }
    __builtin_memset(s.grad, 0, n * ld * sizeof(A));
    add_product<T>(n, a.queries, {s.weight, ldq, 1}, k.grad_out, s.grad, a.D);
    add_product<T>(n, a.queries, {s.grad_score, ldq, 1}, a.query, s.grad, a.D);
    add_product<T>(a.queries, n, {s.grad_score, 1, ldq}, s.rows, k.grad_query, a.D);
    for (int64_t i = 0; i < n; ++i)
      narrow_row(s.grad + i * ld, k.grad_history + (begin + i) * a.D, a.D, tail);
  }
}

// ---- few queries: kQ with those of zeros, at most half a vector

template <class A>
struct Rows {
  const A* p;
  int64_t ld;
};

// Rows [begin, begin + n) as accumulators: where they are, or copied and padded with zeros to whole vectors.
template <class T>
RK_INLINE Rows<Accumulator<T>> whole_vectors(const TargetAttention<T>& a, int64_t begin, int64_t n,
                                             const Tail<T>& tail, Accumulator<T>* copy) {
  using A = Accumulator<T>;
  if constexpr (sizeof(T) == sizeof(A))
    if (a.D % Traits<T>::lanes == 0) return {a.rows + begin * a.stride_row, a.stride_row};
  load_block(a, begin, n, tail, copy);
  return {copy, padded<A>(a.D)};
}

// scores [n, kQ]: products of n rows with `queries`, followed by the lowest up to whole vectors.
template <class A, int kQ>
RK_INLINE void multiply_few(Rows<A> x, int64_t n, const A* queries, int64_t D, A* scores) {
  using X = Traits<A>;
  using V = typename X::vec;
  constexpr int kRows = X::lanes / kQ;
  V lane;
  for (int i = 0; i < X::lanes; ++i) lane[i] = i;
  for (int64_t first = 0; first < n; first += kRows) {
    const A* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = x.p + (first + i < n ? first + i : n - 1) * x.ld;
    V sum[X::lanes] = {};
    for (int64_t d = 0; d < D; d += X::lanes) {
      V query[kQ];
#pragma GCC unroll 8
      for (int c = 0; c < kQ; ++c) query[c] = X::load(queries + c * padded<A>(D) + d);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const V value = X::load(row[i] + d);
#pragma GCC unroll 8
        for (int c = 0; c < kQ; ++c) sum[i * kQ + c] += value * query[c];
      }
    }
    const V product = sum_each(sum);
    X::store(scores + first * kQ, lane < static_cast<A>((n - first) * kQ) ? product : splat<A>(kLowest));
  }
}

// pooled [kQ, padded(D)] = scale times itself + weights [n, kQ], transposed, times rows, kVecs vectors at d.
template <class A, int kQ, int kVecs>
RK_INLINE void pool_columns(Rows<A> x, int64_t n, const A* weights, const A* scale, A* pooled, int64_t ld,
                            int64_t d) {
  using X = Traits<A>;
  using V = typename X::vec;
  constexpr int kSums =
      kQ * kVecs < 8 ? 8 / (kQ * kVecs) : 1;  // rows at once: a multiply-add takes four cycles
  V sum[kSums][kQ][kVecs] = {};
  const auto add = [&](int s, int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const V value = X::load(x.p + i * x.ld + d + v * X::lanes);
#pragma GCC unroll 8
      for (int c = 0; c < kQ; ++c) sum[s][c][v] += splat<A>(weights[i * kQ + c]) * value;
    }
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) add(s, i + s);
  for (; i < n; ++i) add(0, i);
#pragma GCC unroll 8
  for (int c = 0; c < kQ; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
#pragma GCC unroll 8
      for (int s = 1; s < kSums; ++s) sum[0][c][v] += sum[s][c][v];
      A* to = pooled + c * ld + d + v * X::lanes;
      X::store(to, scale[c] * X::load(to) + sum[0][c][v]);
    }
}

template <class T, int kQ>
RK_INLINE void attend_few(const TargetAttention<T>& a, Range rows, const TargetScratch<Accumulator<T>>& s) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t ld = padded<A>(a.D);
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  V highest = splat<A>(kLowest), sum = {};
  for (int64_t begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const int64_t n = rows.end - begin < kBlockRows ? rows.end - begin : kBlockRows;
    const Rows<A> x = whole_vectors(a, begin, n, tail, s.rows);
    multiply_few<A, kQ>(x, n, a.query, a.D, s.weight);
    hide(a, begin, n, s.weight, kQ, kHidden);
    const V before = highest;
    const auto higher = [](V p, V q) __attribute__((always_inline)) { return p > q ? p : q; };
    for (int64_t j = 0; j < n * kQ; j += X::lanes) highest = higher(X::load(s.weight + j), highest);
    highest = combine_parts<kQ>(highest, higher);
    const V scale = weight_of(before - highest);
    sum *= scale;
    for (int64_t j = 0; j < n * kQ; j += X::lanes) {
      const V weight = weight_of(X::load(s.weight + j) - highest);
      X::store(s.weight + j, weight);
      sum += weight;
    }
    A each[X::lanes];
    X::store(each, scale);
    constexpr int kMost = (X::lanes * sizeof(A) == 64 ? 16 : 8) / kQ, kVecs = kMost > 4 ? 4 : kMost;
    int64_t d = 0;
    for (; d + (kVecs - 1) * X::lanes < a.D; d += kVecs * X::lanes)
      pool_columns<A, kQ, kVecs>(x, n, s.weight, each, a.pooled, ld, d);
    for (; d < a.D; d += X::lanes) pool_columns<A, kQ, 1>(x, n, s.weight, each, a.pooled, ld, d);
  }
  sum = combine_parts<kQ>(sum, [](V p, V q) __attribute__((always_inline)) { return p + q; });
  const V inverse = rows.begin < rows.end ? 1 / sum : V{};
  X::store(a.highest, highest);
  X::store(a.inverse, inverse);
  for (int64_t c = 0; c < a.queries; ++c)
    for (int64_t d = 0; d < a.D; d += X::lanes)
      X::store(a.pooled + c * ld + d, a.inverse[c] * X::load(a.pooled + c * ld + d));
}

// p [kQ], once for each row of a vector.
template <class A, int kQ>
RK_INLINE typename Traits<A>::vec repeat(const A* p) {
  A each[Traits<A>::lanes];
  for (int i = 0; i < Traits<A>::lanes; ++i) each[i] = p[i % kQ];
  return Traits<A>::load(each);
}

// Gradients of rows [begin, begin + n) and of the queries by them, a vector of columns at d.
template <class T, int kQ>
RK_INLINE void gradient_columns(const TargetAttentionBackward<T>& k, Rows<Accumulator<T>> x, int64_t begin,
                                int64_t n, const TargetScratch<Accumulator<T>>& s, const Tail<T>& tail,
                                int64_t d) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  using V = typename X::vec;
  const int64_t D = k.forward.D, ld = padded<A>(D);
  V query[kQ], grad_out[kQ], grad_query[kQ];
#pragma GCC unroll 8
  for (int c = 0; c < kQ; ++c) {
    query[c] = X::load(k.forward.query + c * ld + d);
    grad_out[c] = X::load(k.grad_out + c * ld + d);
    grad_query[c] = X::load(k.grad_query + c * ld + d);
  }
  for (int64_t i = 0; i < n; ++i) {
    const V row = X::load(x.p + i * x.ld + d);
    V grad = {};
#pragma GCC unroll 8
    for (int c = 0; c < kQ; ++c) {
      const V weight = splat<A>(s.weight[i * kQ + c]), grad_score = splat<A>(s.grad_score[i * kQ + c]);
      grad += weight * grad_out[c] + grad_score * query[c];
      grad_query[c] += grad_score * row;
    }
    store_columns(k.grad_history + (begin + i) * D + d, grad, d + X::lanes <= D, tail);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kQ; ++c) X::store(k.grad_query + c * ld + d, grad_query[c]);
}

template <class T, int kQ>
RK_INLINE void attend_few_backward(const TargetAttentionBackward<T>& k, Range rows,
                                   const TargetScratch<Accumulator<T>>& s) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  using V = typename X::vec;
  const TargetAttention<T>& a = k.forward;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  const V highest = repeat<A, kQ>(a.highest), inverse = repeat<A, kQ>(a.inverse),
          along = repeat<A, kQ>(k.along);
  for (int64_t begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const int64_t n = rows.end - begin < kBlockRows ? rows.end - begin : kBlockRows;
    const Rows<A> x = whole_vectors(a, begin, n, tail, s.rows);
    multiply_few<A, kQ>(x, n, a.query, a.D, s.weight);
    hide(a, begin, n, s.weight, kQ, kHidden);
    multiply_few<A, kQ>(x, n, k.grad_out, a.D, s.grad_score);
    for (int64_t j = 0; j < n * kQ; j += X::lanes) {
      const V weight = weight_of(X::load(s.weight + j) - highest) * inverse;
      X::store(s.weight + j, weight);
      X::store(s.grad_score + j, weight * (X::load(s.grad_score + j) - along));
    }
    hide(a, begin, n, s.grad_score, kQ, 0);
    for (int64_t d = 0; d < a.D; d += X::lanes) gradient_columns<T, kQ>(k, x, begin, n, s, tail, d);
  }
}

// Calls body with the width of few queries as a type, or many() where they fill more than half a vector.
template <class A, class Body, class Many>
RK_INLINE void with_few(int64_t queries, const Body& body, const Many& many) {
  constexpr int lanes = Traits<A>::lanes;
  if (queries <= 1) return body(Int<1>());
  if constexpr (lanes >= 4)
    if (queries <= 2) return body(Int<2>());
  if constexpr (lanes >= 8)
    if (queries <= 4) return body(Int<4>());
  if constexpr (lanes >= 16)
    if (queries <= 8) return body(Int<8>());
  many();
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
