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

// One user's history, rows of rows [., D] with unit stride along D, and `queries` queries, padded to whole
// cache lines in what is `ld_queries` wide. Those added are zeros.
template <class T>
struct TargetAttention {
  const T* rows;
  int64_t stride_row;
  const bool* valid;  // of each row, or null where all are
  int64_t stride_valid;
  int64_t D, queries, ld_queries;
  const Accumulator<T>* query_columns;  // [D, ld_queries]
  Accumulator<T>*highest, *inverse;     // [ld_queries]: the highest score, and 1 over the sum of exponentials
  Accumulator<T>* pooled;               // [queries, padded(D)], zeroed
};
template <class T>
struct TargetAttentionBackward {
  TargetAttention<T> forward;
  const Accumulator<T>*query_rows, *grad_rows, *grad_columns;  // queries and grad_out, as rows and as columns
  const Accumulator<T>* along;                                 // [ld_queries]: <grad_out, out>
  Accumulator<T>* grad_query;                                  // [queries, padded(D)], added to
  T* grad_history;                                             // rows of D values, one behind the other
};
// A thread's memory: blocks of kBlockRows rows, [., padded(D)] and [., ld_queries].
template <class A>
struct TargetScratch {
  A *rows, *grad;
  A *weight, *grad_score;
};
RK_KERNEL(template <class T>
          void target_attention(TargetAttention<T>, Range rows, TargetScratch<Accumulator<T>>))
RK_KERNEL(template <class T> void target_attention_backward(TargetAttentionBackward<T>, Range rows,
                                                            TargetScratch<Accumulator<T>>))

}  // namespace rk
