// What the kernels of this folder are given: plain data. Neither STL nor a function with external linkage,
// because the kernels' headers are compiled for several instruction sets.
#pragma once

#include <stdint.h>

#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"
#include "cpu/simd/operand.h"

namespace rk {

// ---- augru_kernel.h

// A recurrence over the positions of each sample. A state and its inputs lie side by side, [h, x], `width`
// columns and the rest, and so do the products of the four gates, `width` columns each; width is whole cache
// lines, and the columns beyond D are zeros.
template <class T>
struct Augru {
  const T* x;  // [B, L, inputs], unit stride along the inputs
  int64_t stride_sample, stride_step;
  const T* attention;  // [B, L], or null, which stands for ones
  int64_t stride_attention, stride_attention_step;
  const Accumulator<T>*weight, *bias;  // [columns, padded(4 width)] and [padded(4 width)]
  const int64_t *order, *lengths;      // samples, the longest first; the positions of each
  T* out;                              // [B, L, D]
  int64_t L, D, inputs, width, columns;
};

// grad_out as out, any strides but for D's; grad_attention [B, L] may be null.
template <class T>
struct AugruBackward {
  Augru<T> forward;  // with its results in `out`
  const T* grad_out;
  int64_t stride_grad, stride_grad_step;
  const Accumulator<T>* weight_rows;  // the transpose, [4 width, padded(columns)]
  T *grad_x, *grad_attention;         // [B, L, inputs] and [B, L]
};

// A thread's memory, zeroed: samples of a block are its rows.
template <class A>
struct AugruScratch {
  A *state, *product;          // [kAugruRows, padded(columns)] and [kAugruRows, padded(4 width)]
  A* grad_state;               // as state; the backward's
  A *grad_weight, *grad_bias;  // [4 width, padded(columns)] and [4 width]: sums over the samples
};
// `samples` are numbers in `order`, kAugruRows at most.
RK_KERNEL(template <class T> void augru(Augru<T>, Range samples, AugruScratch<Accumulator<T>>))
RK_KERNEL(template <class T>
          void augru_backward(AugruBackward<T>, Range samples, AugruScratch<Accumulator<T>>))

}  // namespace rk
