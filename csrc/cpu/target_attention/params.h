// What the kernels of this folder are given: plain data. Neither STL nor a function with external linkage,
// because the kernels' headers are compiled for several instruction sets.
#pragma once

#include <stdint.h>

#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"
#include "cpu/simd/operand.h"
#include "cpu/tuning.h"

namespace rk {

// ---- target_attention_kernel.h

// Few queries are followed by zeros up to a power of two, so that a vector holds the scores of whole rows.
static inline int64_t padded_queries(int64_t queries) {
  for (int64_t few = 1; few <= 8; few *= 2)
    if (queries <= few) return few;
  return queries;
}
// One user's history, rows of rows [., D] with unit stride along D, and `queries` queries, padded to whole
// cache lines in what is `ld_queries` wide. Those added are zeros.
template <class T>
struct TargetAttention {
  const T* rows;
  int64_t stride_row;
  const bool* valid;  // of each row, or null where all are
  int64_t stride_valid;
  int64_t D, queries, ld_queries;
  const Accumulator<T>* query;       // [padded_queries(queries), padded(D)]
  Accumulator<T>*highest, *inverse;  // [ld_queries]: the highest score, and 1 over the sum of exponentials
  Accumulator<T>* pooled;            // as query, zeroed
};
template <class T>
struct TargetAttentionBackward {
  TargetAttention<T> forward;
  const Accumulator<T>* grad_out;  // as query
  const Accumulator<T>* along;     // [ld_queries]: <grad_out, out>
  Accumulator<T>* grad_query;      // as query, added to
  T* grad_history;                 // rows of D values, one behind the other
};
// A thread's memory: blocks of kBlockRows rows, [., padded(D)] and [., ld_queries], and [D, ld_queries].
template <class A>
struct TargetScratch {
  A *rows, *grad;
  A *weight, *grad_score;
  A *query_columns, *grad_columns;
};
RK_KERNEL(template <class T>
          void target_attention(TargetAttention<T>, Range rows, TargetScratch<Accumulator<T>>))
RK_KERNEL(template <class T> void target_attention_backward(TargetAttentionBackward<T>, Range rows,
                                                            TargetScratch<Accumulator<T>>))

}  // namespace rk
