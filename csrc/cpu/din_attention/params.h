// What the DIN attention kernels are called with: plain data, prepared by din_attention.cpp and read by the
// copies of din_attention.h for each instruction set. Neither STL nor a function with external linkage (see
// vec.h).
#pragma once

#include <stdint.h>

namespace rk {

// What values stored as T are computed with.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Rows of operands start at multiples of 64 bytes, an odd number of them, so that a column of a wide matrix
// spreads over all sets of the caches.
template <class A>
static inline int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / sizeof(A);
  return ((n + line - 1) / line | 1) * line;
}

// An operand [K, padded(n)] whose n columns end with a few beyond whole vectors has these once more behind
// it, `width` a row, so that one vector holds those of several rows and the product wastes no lanes on
// padding (din_attention_gemm.h). Which they are suits vectors of 16 and of 8 floats; others do without.
struct DinTail {
  int64_t first, width;
  explicit DinTail(int64_t n) : first(n - n % 16), width(0) {
    const int64_t rest = n % 16;
    if (rest > 8) first += 8;
    if (rest > 0 && rest <= 12) width = rest > 4 && rest <= 8 ? 8 : 4;
  }
};
template <class A>
static inline int64_t operand_size(int64_t K, int64_t n) {
  return K * padded<A>(n) + (K + 3) / 4 * 4 * DinTail(n).width;
}

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

// See din_attention_dropout.h.
template <class A>
struct DinDropout {
  uint64_t seed;
  int32_t threshold;
  A scale;
};

template <class A>
struct Din {
  int64_t D, layers;
  const DinLayer<A>* layer;
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

// Where the samples' rows are. Sample b has count[b] valid rows; the storage of what belongs to its rows
// begins at first[b] and has positions[b] = first[b + 1] - first[b] places.
template <class T>
struct DinRows {
  const T *history, *target;
  int64_t stride_hb, stride_hl, stride_tb;
  bool jagged;  // the history's rows of sample b begin at first[b], else at stride_hb * b
  const int64_t *first, *count;
  const uint8_t* mask;  // [B, L], bytes of which any but 0 is true; or null: the first count[b] rows
  const T* grad_out;
  int64_t stride_gb;
  T *out, *grad_history, *grad_target;  // contiguous
};

template <class A>
struct DinGrad {
  DinLayerGrad<A>* layer;
  A *out_weight, *out_bias;  // [padded(H)], [1]
};

// Rows are processed in blocks of at most this many, whose intermediate values stay in the caches: most of
// them in the first-level one, and 128 took 5 to 8 % longer with 100 rows a sample.
constexpr int64_t kDinRows = 64;
// Targets that become operands together.
constexpr int64_t kDinTargets = 8;

// Memory of one thread.
template <class A>
struct DinLayerScratch {
  A *g, *a;             // [kDinRows, padded(out)]: product and activation; in the forward one memory
  A* factor;            // [kDinRows, padded(out)]: the dropout's
  A *mean, *inverse;    // [kDinRows]: dice's mean and 1 / denominator
  A *mean_w, *along_u;  // [kDinRows]: and see dice_backward
};
template <class A>
struct DinScratch {
  DinLayerScratch<A>* layer;
  A* target;                        // [kDinTargets, padded(D)]
  A *grad_out, *out, *grad_target;  // [padded(D)]
  A* history;                       // [kDinRows, padded(D)]
  A* operand;                       // M [D, padded(H)] of a sample, with its tail
  A* bias;                          // [kDinTargets, padded(H)]: c
  A* operand_rows;                  // M [H, padded(D)]
  A *grad_operand, *grad_bias;      // and their gradients, [H, padded(D)] and [padded(H)]
  A *grad, *grad_below;             // [kDinRows, the widest layer]
  A* grad_history;                  // [kDinRows, padded(D)]
  int32_t* positions;               // [L]
};

}  // namespace rk
