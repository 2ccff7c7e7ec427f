// What the kernels of this folder are given: plain data. Neither STL nor a function with external linkage,
// because the kernels' headers are compiled for several instruction sets.
#pragma once

#include <stdint.h>

#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"
#include "cpu/tuning.h"

namespace rk {

// ---- fm_interaction_kernel.h

// x [., F, D] has unit stride along D; out is contiguous, [.] with reduce_sum and [., D] otherwise.
template <class T>
struct FmInteraction {
  const T* x;
  int64_t stride_sample, stride_field;
  T* out;
  int64_t F, D;
  bool reduce_sum;
};
RK_KERNEL(template <class T> void fm_interaction(FmInteraction<T>, Range samples))

// grad_out is as out, its samples stride_grad apart; grad_x [., F, D] is contiguous.
template <class T>
struct FmInteractionBackward {
  const T* grad_out;
  int64_t stride_grad;
  const T* x;
  int64_t stride_sample, stride_field;
  T* grad_x;
  int64_t F, D;
  bool reduce_sum, non_temporal;
};
RK_KERNEL(template <class T> void fm_interaction_backward(FmInteractionBackward<T>, Range samples))

// ---- linear_kernel.h

// out [.] = x [., n] weight [n]
template <class T>
struct Linear {
  const T* x;
  int64_t stride_row;
  const T* weight;
  int64_t n;
  T* out;
};
RK_KERNEL(template <class T> void linear(Linear<T>, Range rows))

// ---- linear_weight_grad_kernel.h

// grad_weight [M, K] = grad_out [N, M]^T x [N, K], or with `add` added to it; columns [first_column, .) of a
// panel, over these samples.
struct LinearWeightGrad {
  const float* grad_out;
  int64_t stride_grad;
  const float* x;
  int64_t stride_x;
  float* grad_weight;
  int64_t K, first_column;
  Range samples;
  bool add;
};
RK_KERNEL(int64_t linear_weight_grad_panel())
// Floats of memory, zeroed, that so many rows of grad_weight need.
RK_KERNEL(int64_t linear_weight_grad_memory(int64_t rows))
RK_KERNEL(void linear_weight_grad(LinearWeightGrad, Range rows, float* memory))

// ---- activation_kernel.h

// linear, leakyrelu and prelu are all `leaky`: y for y > 0 and alpha y otherwise. relu is not: of minus
// infinity it is 0.
enum class Activation : int64_t { leaky, relu, sigmoid, dice, dice_batch_norm };

// One hidden layer, z = W x + b. The GEMM yields g = gs z + go, the affine part folded into the weights. The
// activation's input is y = ys g + yo, for dice_batch_norm the sigmoid's v = vs g + vo. Vectors have
// padded(out) values, absent channels zero.
template <class A>
struct LayerParams {
  int64_t in, out;
  const A *weight,
      *bias;  // the operand of the product, [in, padded(out)] and its tail, and its bias, both with gs and go
  const A* weight_rows;        // W itself, [out, padded(in)], for the backward
  const A *g_scale, *g_shift;  // gs and go, for a kept z
  const A *y_scale, *y_shift;  // null: y = g
  const A *v_scale, *v_shift;
  Activation activation;
  A dropped;           // the dropout's probability
  const A* alpha;      // of all but relu and sigmoid
  A epsilon;           // out * dice's epsilon
  const A* ones_mask;  // 1 for the channels there are
  A* kept;             // [rows, out]: z of each valid row, or null where the backward computes it again
  // [rows]: dice's statistics of each valid row, its mean less the row's first y, or null where the backward
  // takes them again.
  A *kept_from_first, *kept_inverse;
  // Backward through a normalization: dL/dz = r (e - c1 - c2 g) with e the derivative by g that leaves the
  // statistics fixed (in eval c1 = c2 = 0). Null r: no normalization.
  const A *r, *c1, *c2;
};

// Gradients of one layer's parameters, summed over a range of samples.
template <class A>
struct LayerGrad {
  // [out, padded(in)]; the first layer, with G_b the gradient by M of sample b: sums of G, of G diag(t), of
  // G's row sums (those of dL/dz) times t.
  A *weight, *weight_product, *weight_target;
  A *bias, *alpha;  // [padded(out)]; where the units share one alpha its gradient is the sum
  A* sums[4];       // [padded(out)]: of dL/dy, dL/dy g, dL/dv, dL/dv g over the rows
};

// Mean and sum of squared deviations of each channel of z over count rows.
struct ColumnStats {
  double count, *mean, *deviation;
};
// Merges so many rows of known mean and sum of squared deviations into statistics, column by column: Chan,
// Golub and LeVeque (1983), so that the variance loses nothing to the mean.
struct MergeRows {
  double count, share, between;

  RK_INLINE MergeRows(const ColumnStats& stats, int64_t rows)
      : count(stats.count + rows), share(rows / count), between(stats.count * share) {}
  RK_INLINE void operator()(ColumnStats& stats, int64_t h, double mean, double deviation) const {
    const double delta = mean - stats.mean[h];
    stats.mean[h] += delta * share;
    stats.deviation[h] += deviation + delta * delta * between;
  }
};

// Memory of one thread.
template <class A>
struct LayerScratch {
  A *g, *a;                 // [kBlockRows, padded(out)]: product and activation; in the forward one memory
  A* factor;                // [kBlockRows, padded(out)]: the dropout's
  A *mean, *inverse;        // [kBlockRows]: dice's mean and 1 / denominator
  A* from_first;            // [kBlockRows]: that mean less the row's first y
  A *mean_w, *along_units;  // [kBlockRows]: and see dice_backward
};

// ---- norm_activation_kernel.h

// Rows of x [N, H] with unit stride along H, `block` at a time.
template <class T>
struct NormStatistics {
  const T* x;
  int64_t stride_row, H, block;
};
// `memory` is of 2 padded(H) values.
RK_KERNEL(template <class T>
          void norm_statistics(NormStatistics<T>, Range rows, Accumulator<T>* memory, ColumnStats& stats))

// out [N, H] is contiguous.
template <class T>
struct NormActivation {
  LayerParams<Accumulator<T>> layer;
  const T* x;
  int64_t stride_row;
  T* out;
  int64_t block;
  bool non_temporal;
};
RK_KERNEL(template <class T>
          void norm_activation(const NormActivation<T>&, Range rows, const LayerScratch<Accumulator<T>>&))

// grad_x [N, H] is contiguous, or null: then only the sums are wanted.
template <class T>
struct NormActivationBackward {
  LayerParams<Accumulator<T>> layer;
  const T* grad_out;
  int64_t stride_grad;
  const T* x;
  int64_t stride_row;
  T* grad_x;
  int64_t block;
};
// A thread's memory.
template <class A>
struct NormScratch {
  LayerScratch<A> layer;
  A* d;           // [block, padded(H)]
  A* grad_shift;  // [padded(H)]
};
// Adds to the sums and alpha's gradient in `grad`.
RK_KERNEL(template <class T> void norm_activation_backward(const NormActivationBackward<T>&, Range rows,
                                                           const NormScratch<Accumulator<T>>&,
                                                           const LayerGrad<Accumulator<T>>& grad))

// ---- hidden_layers_kernel.h

// A hidden layer, relu(W x + b). `out` is a multiple of kColumns; the columns added are zeros. W^T [in, out]
// lies in panels of columns, one behind the other, each contiguous: that of column n0 begins at n0 in.
struct HiddenLayer {
  static constexpr int64_t kColumns = 16;
  static __attribute__((always_inline)) int64_t whole(int64_t columns) {
    return (columns + kColumns - 1) / kColumns * kColumns;
  }
  const float *weight, *bias;
  int64_t in, out;

  // How wide a panel is, of so many columns left: 48, three vectors of AVX-512, but rather 32 twice than 48
  // and 16, because a product with one vector has more operands to load than multiplications to do.
  static __attribute__((always_inline)) int64_t panel(int64_t left) {
    return left == 64 ? 32 : left < 48 ? left : 48;
  }
};

// A block of samples, and room for the layers' results by turns. Up to whole tiles the rows may be read and
// written.
struct HiddenLayers {
  const HiddenLayer* layers;
  int64_t num_layers;
  const float* x;
  float* hidden[2];
  int64_t stride_x, stride_hidden, rows;
};
// Returns where the last layer's results are: one of `hidden`.
RK_KERNEL(template <class T> const T* hidden_layers(const HiddenLayers&))

}  // namespace rk
