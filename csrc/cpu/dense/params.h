// What the kernels of this folder are given: plain data. Neither STL nor a function with external linkage,
// because the kernels' headers are compiled for several instruction sets.
#pragma once

#include <stdint.h>

namespace rk {

// linear, leakyrelu and prelu are one function, y for y > 0 and alpha * y otherwise. relu is not: its 0 is
// that of minus infinity, too.
enum class DinActivation : int64_t { leaky, relu, sigmoid, dice, dice_batch_norm };

// One hidden layer, z = W x + b. Its product is computed as g = gs z + go, an affine function of each channel
// that is folded into the weight; from it come y = ys g + yo, what the activation is of, and for
// dice_batch_norm the sigmoid's argument v = vs g + vo. Vectors have padded(out) values, absent channels
// zero.
template <class A>
struct DinLayer {
  int64_t in, out;
  const A *weight,
      *bias;  // the operand of the product, [in, padded(out)] and its tail, and its bias, both with gs and go
  const A* weight_rows;        // W itself, [out, padded(in)], for the backward
  const A *g_scale, *g_shift;  // gs and go, for a kept z
  const A *y_scale, *y_shift;  // null: y = g
  const A *v_scale, *v_shift;
  DinActivation activation;
  A dropped;       // the dropout's probability
  const A* alpha;  // of all but relu and sigmoid
  A epsilon;       // out * dice's epsilon
  const A* unit;   // 1 for the channels there are
  A* kept;         // [rows, out]: z of each valid row, or null where the backward computes it again
  A *kept_mean,
      *kept_inverse;  // [rows]: dice's statistics of each valid row, or null where it takes them again
  // Backward through a normalization: dL/dz = r (e - c1 - c2 g) with e the derivative by g that leaves the
  // statistics fixed (in eval c1 = c2 = 0). Null r: no normalization.
  const A *r, *c1, *c2;
};

// Gradients of one layer's parameters, summed over a range of samples.
template <class A>
struct DinLayerGrad {
  // [out, padded(in)]; the first layer, with G_b the gradient by M of sample b: sums of G, of G diag(t), of
  // G's row sums (those of dL/dz) times t.
  A *weight, *weight_product, *weight_target;
  A *bias, *alpha;  // [padded(out)]; where the units share one alpha its gradient is the sum
  A* sums[4];       // [padded(out)]: of dL/dy, dL/dy g, dL/dv, dL/dv g over the rows
};

// Mean and sum of squared deviations of each channel of z over count rows.
struct DinStats {
  double count, *mean, *deviation;
};

// Rows are processed in blocks of at most this many, whose intermediate values stay in the caches: most of
// them in the first-level one, and 128 took 5 to 8 % longer with 100 rows a sample.
constexpr int64_t kDinRows = 64;

// Memory of one thread.
template <class A>
struct DinLayerScratch {
  A *g, *a;             // [kDinRows, padded(out)]: product and activation; in the forward one memory
  A* factor;            // [kDinRows, padded(out)]: the dropout's
  A *mean, *inverse;    // [kDinRows]: dice's mean and 1 / denominator
  A *mean_w, *along_u;  // [kDinRows]: and see dice_backward
};

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

// A block's activations: the lookups and dense columns, and room for the hidden layers' results by turns.
struct DeepBlock {
  const float* x;
  float* hidden[2];
  int64_t stride_x, stride_hidden, rows;
};

}  // namespace rk
