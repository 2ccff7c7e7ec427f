// Attention of few queries, kQ with those of zeros, at most half a vector, for one instruction set.
//
// As columns of a GEMM they would leave most lanes empty, so a vector has the scores of several rows,
// [rows, queries]: a product along D and its share of a sum over lanes each, with 16 lanes D / 16 + 3
// operations instead of D. The mathematics are in target_attention_kernel.h.
#pragma once

#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/target_attention/rows_kernel.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace target {

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

// scores [n, kQ]: products of n rows with `queries`, followed by -inf up to whole vectors.
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
    X::store(scores + first * kQ,
             lane < static_cast<A>((n - first) * kQ) ? product : splat<A>(-__builtin_inff()));
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
  V highest = splat<A>(kLowest<A>), sum = {};
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
}  // namespace RK_ISA
}  // namespace rk
