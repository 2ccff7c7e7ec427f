// Rows of a history and their scores, for one instruction set: what few and many queries have in common.
#pragma once

#include "cpu/simd/math.h"
#include "cpu/simd/rows.h"
#include "cpu/target_attention/params.h"

namespace rk {
namespace RK_ISA {
namespace target {

constexpr float kHidden = -1e9f;
// Finite: the difference of two highest scores is a number, though all scores of a block are -inf.
template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-__FLT_MAX__) : A(-__DBL_MAX__);

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

// rows [n, padded(D)]: those of the history from `begin` on, as accumulators.
template <class T>
RK_INLINE void load_block(const TargetAttention<T>& a, int64_t begin, int64_t n, const Tail<T>& tail,
                          Accumulator<T>* rows) {
  for (int64_t i = 0; i < n; ++i)
    widen_row(a.rows + (begin + i) * a.stride_row, rows + i * padded<Accumulator<T>>(a.D), a.D, tail);
}

}  // namespace target
}  // namespace RK_ISA
}  // namespace rk
