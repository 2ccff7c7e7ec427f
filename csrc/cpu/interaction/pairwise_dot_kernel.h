// Dot products of a sample's fields, every pair once, for one instruction set.
//
// x [B, F, D], r [F (F - 1) / 2] factors of the pairs, or ones. For f < g
//
//   out[b, (f, g)] = r_fg x_f . x_g
//   grad_x[b, f]   = sum_{g > f} s_fg x_g + sum_{g < f} s_gf x_g          s_fg = r_fg grad_out[b, (f, g)]
//   grad_r_fg      = sum_b grad_out[b, (f, g)] x_f . x_g
//
// A sample's products are tiles of a GEMM: X X^T from the transposed sample, of which only the tiles right of
// the diagonal are computed; S X and S^T X with S zero up to the diagonal, of which only the tiles that are
// not zero are. All operands stay in L1 or L2, [B, F, F] never exists. Per sample: forward F D reads, F (F -
// 1) / 2 writes, F (F - 1) D flops; backward as many more reads, F D writes, and twice the flops.
#pragma once

#include "cpu/interaction/params.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/rows.h"

namespace rk {
namespace RK_ISA {
namespace pairwise {

constexpr int64_t kRows = 8;  // fields of a call of the GEMM

// Where a sample's operands lie in a task's memory.
template <class T>
struct Scratch {
  using A = Accumulator<T>;
  static constexpr int64_t kLanes = Traits<A>::lanes;
  int64_t F, D, pairs, of_fields, of_columns;  // rows of so many values
  A *transposed, *square, *rows, *grads, *packed, *dots;

  RK_INLINE Scratch(int64_t F, int64_t D, A* memory)
      : F(F), D(D), pairs(F * (F - 1) / 2), of_fields(padded<A>(F + kLanes)), of_columns(padded<A>(D)) {
    transposed = memory;                        // [D, of_fields]
    square = transposed + D * of_fields;        // [F, of_fields]
    rows = square + (F + 1) * of_fields;        // [F, of_columns]
    grads = rows + F * of_columns;              // [F, of_columns]
    packed = grads + F * of_columns;            // [pairs]
    dots = packed + padded<A>(pairs + kLanes);  // [pairs]
  }
  RK_INLINE int64_t size() const { return dots + padded<A>(pairs + kLanes) - transposed; }
};

// transposed [D, F] of a sample's x [F, D].
template <class T>
RK_INLINE void transpose_sample(const Scratch<T>& s, const T* x, int64_t stride_field, const Tail<T>& tail) {
  using V = typename Traits<T>::vec;
  constexpr int kLanes = Traits<T>::lanes;
  for (int64_t f = 0; f < s.F; f += kLanes)
    for (int64_t d = 0; d < s.D; d += kLanes) {
      const int64_t fields = s.F - f, columns = s.D - d;
      V v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* p = x + (f + i) * stride_field + d;
        v[i] = i >= fields ? V{} : columns >= kLanes ? Traits<T>::load(p) : tail.load(p);
      }
      transpose(v);
      for (int i = 0; i < kLanes && i < columns; ++i)
        Traits<Accumulator<T>>::store(s.transposed + (d + i) * s.of_fields + f, v[i]);
    }
}

// to [pairs] = the dots of the sample that is transposed.
template <class T>
RK_INLINE void dots(const Scratch<T>& s, Accumulator<T>* to) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<A>::lanes;
  const int64_t vecs = (s.F + kLanes - 1) / kLanes;
  for (int64_t f = 0; f < s.F - 1; f += kRows) {
    const int64_t rows = s.F - 1 - f < kRows ? s.F - 1 - f : kRows, v = (f + 1) / kLanes;
    gemm<A>(rows, vecs - v, s.D, {s.transposed + f, 1, s.of_fields}, s.transposed + v * kLanes, s.of_fields,
            s.square + f * s.of_fields + v * kLanes, s.of_fields, nullptr, 0);
  }
  // A row's last vector ends in the next row, which is written next.
  for (int64_t f = 0; f < s.F - 1; ++f) {
    const A* from = s.square + f * s.of_fields + f + 1;
    const int64_t n = s.F - 1 - f;
    for (int64_t i = 0; i < n; i += kLanes) Traits<A>::store(to + i, Traits<A>::load(from + i));
    to += n;
  }
}

// grads [F, D] = (S + S^T) X, S the strict upper triangle in `square`, which is zero elsewhere.
template <class T>
RK_INLINE void multiply(const Scratch<T>& s) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<A>::lanes;
  const int64_t vecs = (s.D + kLanes - 1) / kLanes;
  for (int64_t f = 0; f < s.F; f += kRows) {
    const int64_t rows = s.F - f < kRows ? s.F - f : kRows;
    A* to = s.grads + f * s.of_columns;
    gemm<A>(rows, vecs, s.F - f, {s.square + f * s.of_fields + f, s.of_fields, 1}, s.rows + f * s.of_columns,
            s.of_columns, to, s.of_columns, nullptr, 0);
    gemm<A>(rows, vecs, f + rows, {s.square + f, 1, s.of_fields}, s.rows, s.of_columns, to, s.of_columns, to,
            s.of_columns);
  }
}

}  // namespace pairwise

template <class T>
int64_t pairwise_dot_memory(int64_t F, int64_t D) {
  return pairwise::Scratch<T>(F, D, nullptr).size();
}

template <class T>
void pairwise_dot(PairwiseDot<T> a, Range samples) {
  using A = Accumulator<T>;
  const pairwise::Scratch<T> s(a.F, a.D, a.memory);
  const Tail<T> columns(static_cast<int>(a.D % Traits<T>::lanes)),
      pairs(static_cast<int>(s.pairs % Traits<T>::lanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    pairwise::transpose_sample<T>(s, a.x + b * a.stride_sample, a.stride_field, columns);
    pairwise::dots<T>(s, s.packed);
    if (a.field_weights)
      for (int64_t i = 0; i < s.pairs; i += Traits<A>::lanes)
        Traits<A>::store(s.packed + i, Traits<A>::load(s.packed + i) * Traits<A>::load(a.field_weights + i));
    narrow_row<T>(s.packed, a.out + b * s.pairs, s.pairs, pairs);
  }
}

template <class T>
void pairwise_dot_backward(PairwiseDotBackward<T> a, Range samples) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  const PairwiseDot<T>& of = a.forward;
  const pairwise::Scratch<T> s(of.F, of.D, of.memory);
  const Tail<T> columns(static_cast<int>(of.D % Traits<T>::lanes)),
      pairs(static_cast<int>(s.pairs % Traits<T>::lanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const T* x = of.x + b * of.stride_sample;
    widen_row<T>(a.grad_out + b * a.stride_grad, s.packed, s.pairs, pairs);
    if (of.field_weights) {
      pairwise::transpose_sample<T>(s, x, of.stride_field, columns);
      pairwise::dots<T>(s, s.dots);
      for (int64_t i = 0; i < s.pairs; i += X::lanes) {
        const auto g = X::load(s.packed + i);
        X::store(a.sum_weights + i, X::load(a.sum_weights + i) + g * X::load(s.dots + i));
        X::store(s.packed + i, g * X::load(of.field_weights + i));
      }
    }
    const A* from = s.packed;
    for (int64_t f = 0; f < of.F; ++f) {
      const int64_t n = of.F - 1 - f;
      A* row = s.square + f * s.of_fields;
      for (int64_t i = 0; i <= f; ++i) row[i] = 0;  // where the dots were
      for (int64_t i = 0; i < n; i += X::lanes) X::store(row + f + 1 + i, X::load(from + i));
      from += n;
      widen_row<T>(x + f * of.stride_field, s.rows + f * s.of_columns, of.D, columns);
    }
    pairwise::multiply<T>(s);
    for (int64_t f = 0; f < of.F; ++f)
      narrow_row<T>(s.grads + f * s.of_columns, a.grad_x + (b * of.F + f) * of.D, of.D, columns);
  }
}

#define RK_INSTANTIATE(T)                                    \
  template int64_t pairwise_dot_memory<T>(int64_t, int64_t); \
  template void pairwise_dot<T>(PairwiseDot<T>, Range);      \
  template void pairwise_dot_backward<T>(PairwiseDotBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
