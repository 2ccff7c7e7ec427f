// What the kernels of this folder are given: plain data.
#pragma once

#include <stdint.h>

#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"

namespace rk {

// ---- cross_network_kernel.h

// The layers' parameters: weights [layers, stride] and beta, the sum of the biases, [stride], zero beyond D;
// constants [layers], w_l . beta_l.
template <class A>
struct CrossLayers {
  const A *weights, *beta, *constants;
  int64_t stride, layers, D;
};

// x [., D] has unit stride along D; out [., D] and projections [., layers] are contiguous.
template <class T>
struct CrossNetwork {
  CrossLayers<Accumulator<T>> layers;
  const T* x;
  int64_t stride_row;
  T* out;
  Accumulator<T>* projections;
};
RK_KERNEL(template <class T> void cross_network(CrossNetwork<T>, Range rows))

// Adds to the sums over the rows: of dL/dp_l x [layers, stride], of grad_out [stride], and of dL/dc_l
// [layers]. `memory` is of 4 rows, 2 layers each. grad_x [., D] is contiguous.
template <class T>
struct CrossNetworkBackward {
  CrossLayers<Accumulator<T>> layers;
  const T *grad_out, *x;
  int64_t stride_grad, stride_row;
  const Accumulator<T>* projections;
  T* grad_x;
  Accumulator<T>*sum_weights, *sum_out, *sum_constants, *memory;
};
RK_KERNEL(template <class T> void cross_network_backward(CrossNetworkBackward<T>, Range rows))

// ---- pairwise_dot_kernel.h

// x [., F, D] has unit stride along D; field_weights [F (F - 1) / 2, up to whole vectors] may be null; out is
// contiguous. `memory` is zeroed, of pairwise_dot_memory values.
template <class T>
struct PairwiseDot {
  const T* x;
  int64_t stride_sample, stride_field;
  const Accumulator<T>* field_weights;
  T* out;
  Accumulator<T>* memory;
  int64_t F, D;
};
RK_KERNEL(template <class T> int64_t pairwise_dot_memory(int64_t F, int64_t D))
RK_KERNEL(template <class T> void pairwise_dot(PairwiseDot<T>, Range samples))

// grad_x [., F, D] is contiguous; with field_weights their gradients are added to sum_weights [F (F - 1) / 2,
// up to whole vectors].
template <class T>
struct PairwiseDotBackward {
  PairwiseDot<T> forward;
  const T* grad_out;
  int64_t stride_grad;
  T* grad_x;
  Accumulator<T>* sum_weights;
};
RK_KERNEL(template <class T> void pairwise_dot_backward(PairwiseDotBackward<T>, Range samples))

// ---- cross_layer_kernel.h

// Rows of D values of x0, product and x have unit stride; out is contiguous; bias [D, up to whole vectors]
// may be null.
template <class T>
struct CrossLayer {
  const T *x0, *product, *x;
  int64_t stride_x0, stride_product, stride_x;
  const Accumulator<T>* bias;
  T* out;
  int64_t D;
};
RK_KERNEL(template <class T> void cross_layer(CrossLayer<T>, Range rows))

// The gradients are contiguous; adds the sum of grad_out over the rows to sum_out [D, up to whole vectors],
// if there is one.
template <class T>
struct CrossLayerBackward {
  const T *grad_out, *x0, *product;
  int64_t stride_grad, stride_x0, stride_product;
  T *grad_x0, *grad_product;
  Accumulator<T>* sum_out;
  int64_t D;
};
RK_KERNEL(template <class T> void cross_layer_backward(CrossLayerBackward<T>, Range rows))

// ---- ffm_interaction_kernel.h

// x [., F, F, D] has unit stride along D; out is contiguous, [., pairs, 1] with reduce_sum and [., pairs, D]
// otherwise.
template <class T>
struct FfmInteraction {
  const T* x;
  int64_t stride_sample, stride_field, stride_other;
  T* out;
  int64_t F, D;
  bool reduce_sum, non_temporal;
};
RK_KERNEL(template <class T> void ffm_interaction(FfmInteraction<T>, Range samples))

// grad_out is as out, its samples and pairs so far apart; grad_x [., F, F, D] is contiguous.
template <class T>
struct FfmInteractionBackward {
  FfmInteraction<T> forward;
  const T* grad_out;
  int64_t stride_grad, stride_pair;
  T* grad_x;
};
RK_KERNEL(template <class T> void ffm_interaction_backward(FfmInteractionBackward<T>, Range samples))

// ---- bilinear_interaction_kernel.h

// x [., F, D] has unit stride along D; matrices of D rows of `stride` values, zero beyond D: transposed those
// of the weights, one for all fields, one a field or one a pair; out [., pairs, D] is contiguous. `memory` is
// zeroed, of bilinear_interaction_memory values.
enum class Bilinear : int64_t { all, each, interaction };
template <class T>
struct BilinearInteraction {
  const T* x;
  int64_t stride_sample, stride_field;
  const Accumulator<T>* transposed;
  int64_t stride;
  T* out;
  Accumulator<T>* memory;
  int64_t F, D;
  Bilinear kind;
  bool non_temporal;

  RK_INLINE int64_t weight_of(int64_t field, int64_t pair) const {
    return kind == Bilinear::all ? 0 : kind == Bilinear::each ? field : pair;
  }
};
RK_KERNEL(template <class T> int64_t bilinear_interaction_memory(int64_t F, int64_t D))
RK_KERNEL(template <class T> void bilinear_interaction(BilinearInteraction<T>, Range samples))

// `weights`: not transposed; adds to their gradients, of the same form. grad_x [., F, D] is contiguous.
template <class T>
struct BilinearInteractionBackward {
  BilinearInteraction<T> forward;
  const T* grad_out;
  int64_t stride_grad, stride_pair;
  const Accumulator<T>* weights;
  T* grad_x;
  Accumulator<T>* grad_weights;
};
RK_KERNEL(template <class T>
          void bilinear_interaction_backward(BilinearInteractionBackward<T>, Range samples))

// ---- mixed_experts_kernel.h

// projections [., E rank + E] have unit stride along the columns; transposed [E, rank, stride] are the
// experts' weights, zero beyond the rank; out [., E rank] has unit stride, too. `memory` is zeroed, of
// mixed_experts_memory values.
template <class T>
struct MixedExperts {
  const T* projections;
  int64_t stride_row;
  const Accumulator<T>* transposed;
  T* out;
  int64_t stride_out;
  Accumulator<T>* memory;
  int64_t E, rank, stride;
};
RK_KERNEL(template <class T> int64_t mixed_experts_memory(int64_t E, int64_t rank))
RK_KERNEL(template <class T> void mixed_experts(MixedExperts<T>, Range samples))

// `weight`: not transposed; adds to its gradient, of the same form. grad_projections [., E rank + E] has unit
// stride along the columns. The forward's `out` is written again, unless null.
template <class T>
struct MixedExpertsBackward {
  MixedExperts<T> forward;
  const T* grad_out;
  int64_t stride_grad;
  const Accumulator<T>* weight;
  T* grad_projections;
  int64_t stride_projections;
  Accumulator<T>* grad_weight;
};
RK_KERNEL(template <class T> void mixed_experts_backward(MixedExpertsBackward<T>, Range samples))

// ---- mixed_cross_layer_kernel.h

// Rows of x0 and x have unit stride; out, product (or null) [., D] and projections [., E rank + E] are
// contiguous. Operands of the GEMM: v [D, E rank + E], the gates' columns last, and u [E rank, D]; bias [D,
// up to whole vectors]. Of `experts` E, rank, stride, transposed and memory are given.
template <class T>
struct MixedCrossLayer {
  const T *x0, *x;
  int64_t stride_x0, stride_x;
  const Accumulator<T>*v, *u, *bias;
  MixedExperts<Accumulator<T>> experts;
  T *out, *product;
  Accumulator<T>*projections, *memory;  // memory: zeros, of so many values as the function below says
  int64_t D;
};
RK_KERNEL(template <class T> int64_t mixed_cross_layer_memory(int64_t D, int64_t E, int64_t rank))
RK_KERNEL(template <class T> void mixed_cross_layer(MixedCrossLayer<T>, Range samples))

// v [E rank + E, D] and u [D, E rank] are transposed, `weight` is not. The gradients of x0 and x are
// contiguous; adds to the sums of those of u [D, E rank] and v [E rank + E, D] in rows of an operand's
// length, of the experts' weights, and of the bias.
template <class T>
struct MixedCrossLayerBackward {
  const T *grad_out, *x0, *x, *product;
  int64_t stride_grad, stride_x0, stride_x;
  const Accumulator<T>*v, *u, *weight, *projections;
  MixedExperts<Accumulator<T>> experts;
  T *grad_x0, *grad_x;
  Accumulator<T>*sum_u, *sum_v, *sum_weight, *sum_bias, *memory;
  int64_t D;
};
RK_KERNEL(template <class T> int64_t mixed_cross_layer_backward_memory(int64_t D, int64_t E, int64_t rank))
RK_KERNEL(template <class T> void mixed_cross_layer_backward(MixedCrossLayerBackward<T>, Range samples))

}  // namespace rk
