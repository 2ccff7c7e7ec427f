// What the DIN attention kernels are called with: plain data, prepared by din_attention.cpp and read by the
// copies of forward_kernel.h for each instruction set. Neither STL nor a function with external linkage (see
// vec.h).
#pragma once

#include <stdint.h>

#include "cpu/dense/params.h"
#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"
#include "cpu/tuning.h"

namespace rk {

// See dropout_kernel.h.
template <class A>
struct DinDropout {
  uint64_t seed;
  int32_t threshold;
  A scale;
};

template <class A>
struct Din {
  int64_t D, layers;
  const LayerParams<A>* layer;
  // The first layer's weight in the parts of its identity, as forward operands [D, padded(H)] and as rows
  // [H, padded(D)]: Wt + Wd, Wh - Wd and Wp. The former have tails.
  const A *target_weight, *history_weight, *product_weight;
  const A *target_rows, *history_rows, *product_rows;
  const A* out_weight;  // [padded(H)] of the last layer
  A out_bias;
  bool use_softmax, drops;
  DinDropout<A> dropout;
  A* row_weight;  // [rows]: the weight of each valid row in the sum
  A* grad_score;  // [rows]: and in the backward its gradient before any softmax
};

// Where the samples' rows are. Of sample b count[b] rows are computed; the storage of what belongs to its
// rows begins at first[b] and has first[b + 1] - first[b] places. Valid are all of the rows computed, or
// where padding counts pooled[b] of them: those of the mask, or the first.
//
// Histories that samples share: b counts samples in the order of their histories. Sample b is then sample[b]
// of the target and the output, and its history is user[b], whose rows in the mask and in the gradient begin
// at place[b]. A history's gradient is summed over a segment, neighbouring samples of one history.
template <class T>
struct DinRows {
  const T *history, *target;
  int64_t stride_hb, stride_hl, stride_tb;
  bool jagged;  // the history's rows of sample b begin at place[b], else at stride_hb times its number
  const int64_t *first, *count, *pooled;  // the last is null where padding does not count
  const int64_t *sample, *user, *place;   // the first two are null where no history is shared
  const int64_t* segment;                 // [B + 1]: the number of b's, and one that is none
  Accumulator<T>* const* segment_sum;     // where one that is not all of its history is summed, else null
  const uint8_t* mask;  // [B, L], bytes of which any but 0 is true; or null: the first count[b] rows
  const T* grad_out;    // or null, where the gradient is that by the rows' weights, grad_weight [rows]
  int64_t stride_gb;
  const Accumulator<T>* grad_weight;
  T *out, *grad_history, *grad_target;  // contiguous; without out only the rows' weights are made
};

template <class A>
struct DinGrad {
  LayerGrad<A>* layer;
  A *out_weight, *out_bias;  // [padded(H)], [1]
};

// Memory of one thread.
template <class A>
struct DinScratch {
  LayerScratch<A>* layer;
  A* target;                        // [kDinTargets, padded(D)]
  A *grad_out, *out, *grad_target;  // [padded(D)]
  A* history;                       // [kBlockRows, padded(D)], of a shared history [rows, padded(D)]
  bool fresh;                       // whether a shared history is not that of the sample before
  A* operand;                       // M [D, padded(H)] of a sample, with its tail
  A* bias;                          // [kDinTargets, padded(H)]: c
  A* operand_rows;                  // M [H, padded(D)]
  A *grad_operand, *grad_bias;      // and their gradients, [H, padded(D)] and [padded(H)]
  A *grad, *grad_below;             // [kBlockRows, the widest layer]
  A* grad_history;                  // as history
  int32_t* positions;               // [L]
};

// A pass over the rows of samples, from layer 0 up. With until < layers: the statistics of z of layer `until`
// (whose gs is 1, go 0), which is kept if there is room for it, into `stats`; with until = layers the output.
template <class T>
struct DinForward {
  const Din<Accumulator<T>>& network;
  const DinRows<T>& rows;
  int64_t until;
};
RK_KERNEL(template <class T> void din_forward(const DinForward<T>&, Range samples,
                                              const DinScratch<Accumulator<T>>&, ColumnStats* stats))

// A pass back to layer `until`: its sums, or with until < 0 all gradients. With need_score dL/dscore comes
// first.
template <class T>
struct DinBackward {
  const Din<Accumulator<T>>& network;
  const DinRows<T>& rows;
  int64_t until;
  bool need_score;
};
RK_KERNEL(template <class T> void din_backward(const DinBackward<T>&, Range samples,
                                               const DinScratch<Accumulator<T>>&,
                                               const DinGrad<Accumulator<T>>&))

}  // namespace rk
