// The layers of a ranking model on a tile of candidates, one a lane, for one instruction set.
//
//   y_u = init_u + sum_k W_uk x_k
//
// Weights are broadcast and candidates fill the vectors, so that what the user has alone costs nothing: it is
// in init. Activations need no sum over lanes: dice's statistics run down the units. Each lane is summed in
// order, so that its bits do not depend on its neighbours.
//
// Per candidate 2 in out flops a layer. A tile reads the weights once, from L2, 48 flops a value with AVX2,
// and its own inputs once a group of units.
#pragma once

#include "cpu/serve/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace serve {

constexpr int64_t kTile = kRankVecs * kFloats;

// A tile's vectors. The products of a CPU whose multipliers are 32 bytes wide take half as long for half a
// vector of 64; all else takes whole ones.
template <int n, class V>
struct Vecs {
  static constexpr int count = n;
  using vec = V;
};
constexpr int64_t kStep = RK_VECTOR_BYTES == 64 ? kFloats / 2 : kFloats;
using step_vec = VectorOf<float, kStep>::type;

// Calls body with a tile's vectors as a type.
template <class Body>
RK_INLINE void with_vecs(int64_t lanes, const Body& body) {
  if (lanes == kStep) return body(Vecs<1, step_vec>());
  if (lanes == kFloats) return body(Vecs<1, f32v>());
  if (lanes == 2 * kFloats) return body(Vecs<2, f32v>());
  body(Vecs<3, f32v>());
}

// Groups of four units whose sums stay in registers beside so many vectors.
template <int kVecs>
constexpr int kGroups = RK_VECTOR_BYTES == 64 || kVecs == 1 ? 2 : 1;

template <class V, int kVecs, int kOf>
RK_INLINE void product_tile(const RankProduct& p, int64_t group) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  V sum[4 * kOf][kVecs];
  float* y = p.y + 4 * group * kTile;
  const int64_t stride = 4 * p.in;
#pragma GCC unroll 8
  for (int u = 0; u < 4 * kOf; ++u)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sum[u][v] = splat_to<V>(p.init[4 * group + u]);
  for (int64_t r = 0; r < p.num_runs; ++r) {
    const int64_t begin = p.runs[r].begin, n = p.runs[r].end - begin;
    const float *x = p.x + begin * kTile, *w = p.weight + group * stride + 4 * begin;
    for (int64_t k = 0; k < n; ++k, x += kTile, w += 4) {
      V xv[kVecs];
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) xv[v] = load_vector<V>(x + v * kLanes);
#pragma GCC unroll 8
      for (int u = 0; u < 4 * kOf; ++u) {
        const V wu = splat_to<V>(w[u / 4 * stride + u % 4]);
#pragma GCC unroll 3
        for (int v = 0; v < kVecs; ++v) sum[u][v] += wu * xv[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < 4 * kOf; ++u)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) store_vector(y + u * kTile + v * kLanes, sum[u][v]);
  if constexpr (kLanes < kFloats)  // what follows takes whole vectors
#pragma GCC unroll 8
    for (int u = 0; u < 4 * kOf; ++u) store_vector(y + u * kTile + kLanes, V{});
}

template <class V, int kVecs>
static __attribute__((noinline)) void product(RankProduct p) {
  int64_t g = 0;
  for (; g + kGroups<kVecs> <= p.groups; g += kGroups<kVecs>) product_tile<V, kVecs, kGroups<kVecs>>(p, g);
  for (; g < p.groups; ++g) product_tile<V, kVecs, 1>(p, g);
}
template <class Tile>
RK_INLINE void product_of(Tile, const RankProduct& p) {
  product<typename Tile::vec, Tile::count>(p);
}

// y = each(y, unit, vector), or the score of it.
template <int kVecs, bool kScore, class Each>
RK_INLINE void each_unit(const RankActivation& a, const Each& each) {
  float* y = a.y;
  const float* weight = a.layer.score_weight;
  f32v score[kVecs];
#pragma GCC unroll 3
  for (int v = 0; v < kVecs; ++v) score[v] = splat<float>(a.layer.score_bias);
  for (int64_t h = 0; h < a.layer.out; ++h, y += kTile)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      const f32v r = each(load_vector<f32v>(y + v * kFloats), h, v);
      if (kScore)
        score[v] += weight[h] * r;
      else
        store_vector(y + v * kFloats, r);
    }
  if (kScore)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) store_vector(a.score + v * kFloats, score[v]);
}

// See dice_statistics in dense/activation_kernel.h: about the first unit, in one pass.
template <int kVecs>
RK_INLINE void dice_statistics(const RankActivation& a, f32v* shift, f32v* inverse) {
  const float* y = a.y;
  f32v first[kVecs], sum[kVecs] = {}, squares[kVecs] = {};
#pragma GCC unroll 3
  for (int v = 0; v < kVecs; ++v) first[v] = load_vector<f32v>(y + v * kFloats);
  for (int64_t h = 0; h < a.layer.out; ++h, y += kTile)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      const f32v c = load_vector<f32v>(y + v * kFloats) - first[v];
      sum[v] += c;
      squares[v] += c * c;
    }
  const float share = 1.f / static_cast<float>(a.layer.out);
#pragma GCC unroll 3
  for (int v = 0; v < kVecs; ++v) {
    const f32v along = sum[v] * share, all = squares[v];
    const f32v deviation = all < __builtin_inff() ? all - sum[v] * along : all;
    inverse[v] = 1.f / square_root((deviation < 0 ? f32v{} : deviation) + a.layer.epsilon);
    shift[v] = first[v] + along;
  }
}

template <int kVecs, bool kScore>
static __attribute__((noinline)) void activation(RankActivation a) {
  const RankLayer& l = a.layer;
  switch (l.activation) {
    case Activation::leaky:
      return each_unit<kVecs, kScore>(a, [&](f32v y, int64_t h, int) __attribute__((always_inline)) {
        return y > 0 ? y : y * l.alpha[h];
      });
    case Activation::relu:
      return each_unit<kVecs, kScore>(
          a, [&](f32v y, int64_t, int) __attribute__((always_inline)) { return relu(y); });
    case Activation::sigmoid:
      return each_unit<kVecs, kScore>(
          a, [&](f32v y, int64_t, int) __attribute__((always_inline)) { return sigmoid(y); });
    case Activation::dice_batch_norm:
      return each_unit<kVecs, kScore>(a, [&](f32v y, int64_t h, int) __attribute__((always_inline)) {
        const f32v ay = y * l.alpha[h];
        return ay + sigmoid(y * l.v_scale[h] + l.v_shift[h]) * (y - ay);
      });
    case Activation::dice: {
      f32v shift[kVecs], inverse[kVecs];
      dice_statistics<kVecs>(a, shift, inverse);
      return each_unit<kVecs, kScore>(a, [&](f32v y, int64_t h, int v) __attribute__((always_inline)) {
        const f32v u = (y - shift[v]) * inverse[v];
        return y * (l.alpha[h] + (1 - l.alpha[h]) * sigmoid_unit(u));
      });
    }
  }
}

RK_INLINE void activate(const RankActivation& a) {
  with_vecs(a.lanes, [&](auto vecs) __attribute__((always_inline)) {
    if (a.score)
      activation<decltype(vecs)::count, true>(a);
    else
      activation<decltype(vecs)::count, false>(a);
  });
}

}  // namespace serve

int64_t rank_tile() { return serve::kTile; }
int64_t rank_step() { return serve::kStep; }

void rank_product(RankProduct p) {
  serve::with_vecs(p.lanes, [&](auto vecs) __attribute__((always_inline)) { serve::product_of(vecs, p); });
}

void rank_product_of_user(RankProduct p) {
  typedef VectorOf<float, 4>::type units;
  for (int64_t g = 0; g < p.groups; ++g) {
    units sum[4] = {load_vector<units>(p.init + 4 * g)};
    for (int64_t r = 0; r < p.num_runs; ++r) {
      const float* w = p.weight + (g * p.in + p.runs[r].begin) * 4;
      int64_t k = p.runs[r].begin;
      for (; k + 4 <= p.runs[r].end; k += 4, w += 16)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[i] += load_vector<units>(w + 4 * i) * p.x[k + i];
      for (; k < p.runs[r].end; ++k, w += 4) sum[0] += load_vector<units>(w) * p.x[k];
    }
    store_vector(p.y + 4 * g, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

void rank_activation(RankActivation a) { serve::activate(a); }

void rank_field(RankField a) {
  constexpr int64_t kTile = serve::kTile;
  for (int64_t v = 0; v < a.lanes; v += kFloats) {
    f32v squares{}, logit = load_vector<f32v>(a.logit + v);
    for (int64_t d = 0; d < a.D; ++d) {
      const f32v x = load_vector<f32v>(a.x + d * kTile + v);
      if (a.weight) logit += a.weight[d] * x;
      if (!a.sums) continue;
      float* sum = a.sums + d * kTile + v;
      store_vector(sum, load_vector<f32v>(sum) + x);
      squares += x * x;
    }
    store_vector(a.logit + v, logit);
    if (a.sums) store_vector(a.squares + v, load_vector<f32v>(a.squares + v) + squares);
  }
}

void rank_scores(RankScores a) {
  for (int64_t v = 0; v < a.lanes; v += kFloats) {
    f32v y = load_vector<f32v>(a.logit + v);
    if (a.sums) {
      f32v all{};
      for (int64_t d = 0; d < a.D; ++d) {
        const f32v s = load_vector<f32v>(a.sums + d * serve::kTile + v);
        all += s * s;
      }
      y += .5f * (all - load_vector<f32v>(a.squares + v));
    }
    if (a.score) y += load_vector<f32v>(a.score + v);
    store_vector(a.out + v, a.sigmoid ? sigmoid(y) : y);
  }
}

}  // namespace RK_ISA
}  // namespace rk
