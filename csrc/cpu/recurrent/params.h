// What the kernels of this folder are given: plain data. Neither STL nor a function with external linkage,
// because the kernels' headers are compiled for several instruction sets.
#pragma once

#include <stdint.h>

#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"
#include "cpu/simd/operand.h"

namespace rk {

// ---- augru_kernel.h

// A recurrence over the positions of each sample. gates [B, L, 3 D] has unit stride along 3 D; attention
// [B, L] may be null, which stands for ones. Each gate has `width` columns of the operands, whole cache
// lines, those beyond D zero.
template <class T>
struct Augru {
  const T* gates;
  int64_t stride_sample, stride_step;
  const T* attention;
  int64_t stride_attention, stride_attention_step;
  const Accumulator<T>*weight,
      *bias;                       // U^T [width, padded(3 width)]; [padded(3 width)], of the candidate alone
  const int64_t *order, *lengths;  // samples, the longest first; the positions of each
  T* out;                          // [B, L, D]
  int64_t L, D, width;
};
// grad_out as out, any strides but for D's; grad_attention [B, L] may be null.
template <class T>
struct AugruBackward {
  Augru<T> forward;  // with its results in `out`
  const T* grad_out;
  int64_t stride_grad, stride_grad_step;
  const Accumulator<T>* weight_rows;  // U [3 width, padded(width)]
  T *grad_gates, *grad_attention;     // [B, L, 3 D] and [B, L]
};
// A thread's memory, zeroed: samples of a block are its rows.
template <class A>
struct AugruScratch {
  A *state, *product;          // [kAugruRows, padded(width)] and [kAugruRows, padded(3 width)]
  A* grad_state;               // as state; the backward's
  A *grad_weight, *grad_bias;  // [3 width, padded(width)] and [padded(width)]: sums over the task's samples
};
// `samples` are numbers in `order`, kAugruRows at most.
RK_KERNEL(template <class T> void augru(Augru<T>, Range samples, AugruScratch<Accumulator<T>>))
RK_KERNEL(template <class T>
          void augru_backward(AugruBackward<T>, Range samples, AugruScratch<Accumulator<T>>))

}  // namespace rk
