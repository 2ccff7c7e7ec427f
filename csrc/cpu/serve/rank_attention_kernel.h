// DIN attention of many candidates to one user's history, for one instruction set.
//
// For a row h and a candidate's target t the first layer is (din_attention/forward_kernel.h)
//
//   z = [b + (Wh - Wd) h] + N t,   N = (Wt + Wd) + Wp diag(h)   [H, D]
//
// so that the roles are changed: N is formed once a row of the history, and candidates are the lanes of
// rank_layers_kernel.h. The scores of all rows, [L, tile], are then an operand of one product,
//
//   out = history^T (w * count),   w = score or softmax(score)
//
// where count says how often a row comes: rows that are equal, as padding is, are computed once. Per row and
// candidate 2 (D H + H H' + .. + D) flops; 2 D H a row and block of candidates to form N. Nothing is of the
// size of candidates times history.
#pragma once

#include "cpu/serve/params.h"
#include "cpu/serve/rank_layers_kernel.h"
#include "cpu/simd/gemm.h"

namespace rk {
namespace RK_ISA {
namespace serve {

// Four units of each of lanes / 4 inputs a vector.
RK_INLINE f32v spread_inputs(const float* h) {
#if RK_VECTOR_BYTES == 16
  return splat<float>(*h);
#else
  return spread(h, Int<4>());
#endif
}

RK_INLINE void form_operand(const RankAttention& a, const float* h, float* operand) {
  const int64_t width = rank_width(a.D);
  for (int64_t g = 0; g < a.layers[0].groups(); ++g)
    for (int64_t d = 0; d < width; d += kFloats / 4) {
      const int64_t i = (g * width + d) * 4;
      store_vector(operand + i, load_vector<f32v>(a.target_weight + i) +
                                    spread_inputs(h + d) * load_vector<f32v>(a.product_weight + i));
    }
}

// scores [tile] of one row of the history.
template <class Tile>
RK_INLINE void score_row(Tile vecs, const RankAttention& a, int64_t l, const RankTile& tile,
                         const RankTiles& t) {
  const RankRun inputs{0, a.D};
  product_of(vecs, {t.operand, a.layers[0].groups(), rank_width(a.D), &inputs, 1, tile.target, t.hidden[0],
                    a.init + l * a.stride_init, tile.lanes});
  for (int64_t i = 0;; ++i) {
    float* y = t.hidden[i % 2];
    if (i + 1 == a.num_layers)
      return activation<Tile::count, true>({a.layers[i], y, tile.scores + l * kTile, tile.lanes});
    activation<Tile::count, false>({a.layers[i], y, nullptr, tile.lanes});
    const RankLayer& next = a.layers[i + 1];
    const RankRun all{0, next.in};
    product_of(vecs, {next.weight, next.groups(), next.in, &all, 1, y, t.hidden[(i + 1) % 2], next.bias,
                      tile.lanes});
  }
}

// scores -> softmax over the rows, of those that come several times one's share.
RK_INLINE void softmax_rows(const RankAttention& a, const RankTile& tile) {
  for (int64_t v = 0; v < tile.lanes; v += kFloats) {
    float* s = tile.scores + v;
    f32v peak = splat<float>(-__builtin_inff()), total{};
    for (int64_t l = 0; l < a.L; ++l) {
      const f32v x = load_vector<f32v>(s + l * kTile);
      peak = x > peak ? x : peak;
    }
    for (int64_t l = 0; l < a.L; ++l) {
      const f32v e = exp(load_vector<f32v>(s + l * kTile) - peak);
      total += a.count[l] * e;
      store_vector(s + l * kTile, e);
    }
    for (int64_t l = 0; l < a.L; ++l) store_vector(s + l * kTile, load_vector<f32v>(s + l * kTile) / total);
  }
}

}  // namespace serve

void rank_attention(const RankAttention& a, const RankTiles& t) {
  if (a.num_layers == 0)  // every row has the same score
    for (int64_t i = 0; i < t.n; ++i)
      for (int64_t j = 0; j < a.L * serve::kTile; ++j) t.tile[i].scores[j] = 0;
  for (int64_t l = 0; l < a.L && a.num_layers > 0; ++l) {
    serve::form_operand(a, a.history + l * rank_width(a.D), t.operand);
    for (int64_t i = 0; i < t.n; ++i)
      serve::with_vecs(t.tile[i].lanes, [&](auto vecs) __attribute__((always_inline)) {
        serve::score_row(vecs, a, l, t.tile[i], t);
      });
  }
  static constexpr float kZeros[4] = {};
  for (int64_t i = 0; i < t.n; ++i) {
    const RankTile& tile = t.tile[i];
    if (a.use_softmax) serve::softmax_rows(a, tile);
    const RankRun rows{0, a.L};
    for (int64_t g = 0; g < rank_width(a.D) / 4; ++g)
      rank_product({a.pool + g * a.L * 4, 1, a.L, &rows, 1, tile.scores, tile.pooled + 4 * g * serve::kTile,
                    kZeros, tile.lanes});
  }
}

void rank_history(RankHistory a) {
  gemm<float>(a.L, (a.out + kFloats - 1) / kFloats, a.D, {a.history, rank_width(a.D), 1}, a.weight, a.stride,
              a.init, a.stride, a.bias, 0);
}

}  // namespace RK_ISA
}  // namespace rk
