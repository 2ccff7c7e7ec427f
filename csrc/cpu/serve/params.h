// What the kernels of this folder are given: plain structs, because the kernels' headers are compiled for
// several instruction sets.
//
// Candidates lie in the lanes of vectors: a tile is kRankVecs vectors of them at most, and a value that each
// candidate has is a row of rank_tile() floats. So what belongs to the user alone is a scalar. A tile
// computes `lanes`, a multiple of rank_step(): whole vectors, or the half of one.
#pragma once

#include <stdint.h>

#include "cpu/dense/params.h"
#include "cpu/simd/kernel.h"

namespace rk {

constexpr int kRankVecs = 3;

RK_KERNEL(int64_t rank_tile())
RK_KERNEL(int64_t rank_step())

// ---- rank_rows_kernel.h

// A table [R, D] as it is stored: float32, bfloat16, or a row of scale, bias (float32) and D codes of 8 or 4
// bits. A value is bias + scale code; a row of 4-bit codes is its first half in the low bits, the second half
// in the high bits.
struct FrozenTable {
  const char* data;
  int64_t R, D, row_bytes, bits;
};
// Row rows[i] -> out [i ld, D]; with `add` it is added there.
struct FrozenRows {
  FrozenTable table;
  const int64_t* rows;
  int64_t n;
  float* out;
  int64_t ld;
  bool add;
};
RK_KERNEL(void frozen_rows(FrozenRows))

// columns [D, tile] = rows [lanes, ld], transposed in whole vectors; ld is a multiple of 16, and so many
// values of a row may be read.
struct RankColumns {
  const float* rows;
  int64_t ld, D;
  float* columns;
  int64_t lanes;
};
RK_KERNEL(void rank_columns(RankColumns))

// ---- rank_layers_kernel.h

// Inputs [begin, end) of a product.
struct RankRun {
  int64_t begin, end;
};
// y [4 groups, tile] = init + W x. W lies in groups of four units, [groups, in, 4], zeros for absent ones.
struct RankProduct {
  const float* weight;
  int64_t groups, in;
  const RankRun* runs;
  int64_t num_runs;
  const float* x;
  float* y;
  const float* init;  // a number a unit
  int64_t lanes;
};
RK_KERNEL(void rank_product(RankProduct))
// The same of a single x [in]: y [4 groups].
RK_KERNEL(void rank_product_of_user(RankProduct))

// A hidden layer behind its product; see LayerParams of dense/params.h.
struct RankLayer {
  int64_t in, out;
  const float *weight, *bias;
  Activation activation;
  const float *alpha, *v_scale, *v_shift;
  float epsilon;              // out * dice's epsilon
  const float* score_weight;  // of the last layer: score = <a, score_weight> + score_bias
  float score_bias;

  RK_INLINE int64_t groups() const { return (out + 3) / 4; }
};
struct RankActivation {
  RankLayer layer;
  float* y;      // [out, tile], in place
  float* score;  // [tile], or null: the activations are wanted
  int64_t lanes;
};
RK_KERNEL(void rank_activation(RankActivation))

// A field of the FM and of the linear term: sums [D, tile], squares [tile] and logit [tile] grow by x
// [D, tile], x^2 and weight x.
struct RankField {
  const float* x;
  int64_t D;
  const float* weight;    // [D], or null
  float *sums, *squares;  // or null
  float* logit;
  int64_t lanes;
};
RK_KERNEL(void rank_field(RankField))

// out = score + logit + (|sums|^2 - squares) / 2, or its sigmoid.
struct RankScores {
  const float *score, *logit, *sums, *squares;  // score and sums may be null
  int64_t D;
  bool sigmoid;
  float* out;  // [tile]
  int64_t lanes;
};
RK_KERNEL(void rank_scores(RankScores))

// ---- rank_attention_kernel.h

// The attention of candidates to one history: see there.
struct RankAttention {
  const RankLayer* layers;
  int64_t num_layers, D, L;
  const float* history;                         // [L, rank_width(D)], zeros behind D
  const float *target_weight, *product_weight;  // [groups, rank_width(D), 4]
  const float* init;                            // [L, stride_init]: b + (Wh - Wd) h
  int64_t stride_init;
  const float* pool;   // [(D + 3) / 4, L, 4]: rows times how often they come
  const float* count;  // [L]: how often
  bool use_softmax;
};
// Values of a row whose groups of four fill whole vectors.
RK_INLINE int64_t rank_width(int64_t D) { return (D + 3) / 4 * 4; }

struct RankTile {
  int64_t lanes;
  const float* target;  // [D, tile]
  float* scores;        // [L, tile]
  float* pooled;        // [4 ceil(D / 4), tile]
};
struct RankTiles {
  const RankTile* tile;
  int64_t n;
  float* operand;    // [groups, rank_width(D), 4]
  float* hidden[2];  // [widest layer, tile]
};
RK_KERNEL(void rank_attention(const RankAttention&, const RankTiles&))

// init [L, stride] = bias + weight^T history, weight [D, stride]; whole vectors.
struct RankHistory {
  const float *history, *weight, *bias;
  int64_t L, D, out, stride;
  float* init;
};
RK_KERNEL(void rank_history(RankHistory))

}  // namespace rk
