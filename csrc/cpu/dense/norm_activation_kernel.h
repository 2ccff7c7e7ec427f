// Batch normalization and activation of a hidden layer's GEMM, forward and backward, for one instruction
// set.
//
// x [N, H] has a row a sample and a column a unit. With m and v the mean and variance of a column, those of
// the batch in training, and r = 1 / sqrt(v + eps),
//
//   n = (x - m) r,    out = activation(gamma n + beta)                          any activation but the last:
//                     out = alpha x + sigmoid(gamma n + beta) (x - alpha x)     dice_batch_norm
//
// and without a normalization out = activation(x). Dice, whose statistics run along a row, works on blocks of
// rows (activation_kernel.h); the other activations' units are independent and are processed straight from
// memory, a few vectors of columns at a time. Backward, with e = dL/dn and, for dice_batch_norm, d what of
// dL/dx goes past the normalization (0 else), in training
//
//   grad_x     = d + r (e - mean(e) - n mean(e n))
//   grad_gamma = sum n dL/d(gamma n + beta),    grad_beta = sum dL/d(gamma n + beta)
//
// where means and sums run down a column; in eval the two means are absent.
//
// Passes over an array of x's size. Training with a normalization: forward read x for the statistics, read x,
// write out; backward read x and grad_out for the sums, read both, write grad_x: 8 in all, where torch's
// normalization and activation need 10 (relu) to about 50 (dice in plain operations). Without statistics of
// the batch: forward 2, backward 3. Nothing of x's size is kept but x. Flops: about 10 a value for relu, 60
// for dice, forward and backward; memory is the bound. A large out is stored
// non-temporally; for grad_x that gained nothing.
#pragma once

#include "cpu/dense/activation_kernel.h"
#include "cpu/dense/params.h"
#include "cpu/simd/accumulator.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/non_temporal.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace norm {

// The constants of one vector of columns, zero for absent ones, and its sums over the rows.
template <Activation kind, bool kNormalized, class A>
struct Units {
  using X = Traits<A>;
  using V = typename X::vec;

  static RK_INLINE Units at(const LayerParams<A>& f, int64_t h) {
    const auto constant = [&](const A* p) { return p ? X::load(p + h) : V{}; };
    return {constant(f.g_scale), constant(f.g_shift), constant(f.y_scale), constant(f.y_shift),
            constant(f.alpha),   constant(f.r),       constant(f.c1),      constant(f.c2)};
  }

  V forward(V x) const {
    const V v = argument(normalized(x));
    if (kind == Activation::leaky) return v > 0 ? v : v * alpha;
    if (kind == Activation::relu) return relu(v);
    if (kind == Activation::sigmoid) return sigmoid(v);
    const V ax = alpha * x;
    return ax + sigmoid(v) * (x - ax);
  }

  // dL/dout -> dL/dx; adds to the sums. In eval nothing is taken away: 0 times an infinite n would be NaN.
  template <bool kMeans>
  V backward(V grad, V x) {
    const V n = normalized(x), v = argument(n);
    V e, d = {};
    if (kind == Activation::leaky) {
      e = v > 0 ? grad : grad * alpha;
      sum_alpha += v > 0 ? V{} : grad * v;
    } else if (kind == Activation::relu) {
      e = relu_backward(grad, v);
    } else {
      const V p = sigmoid(v), slope = p - p * p;
      if (kind == Activation::sigmoid) {
        e = grad * slope;
      } else {
        const V gx = grad * x;
        e = (1 - alpha) * gx * slope;
        d = grad * (alpha + (1 - alpha) * p);
        sum_alpha += gx * (1 - p);
      }
    }
    if (!kNormalized) return e;
    sum_e += e;
    sum_en += e * n;
    return d + r * (kMeans ? gamma * e - c1 - c2 * n : gamma * e);
  }

  V normalized(V x) const { return kNormalized ? x * scale + shift : x; }
  V argument(V n) const { return kNormalized ? n * gamma + beta : n; }

  V scale, shift, gamma, beta, alpha, r, c1, c2;
  V sum_e = {}, sum_en = {}, sum_alpha = {};
};

// Calls body(ColumnBlock, its first column, its Units): four vectors of columns at a time, then one.
template <class U, class T, class Body>
RK_INLINE void for_each_units(const LayerParams<Accumulator<T>>& f, const Body& body) {
  constexpr int64_t kLanes = Traits<T>::lanes;
  const auto call = [&](auto columns, int64_t h) __attribute__((always_inline)) {
    U units[decltype(columns)::vecs];
#pragma GCC unroll 4
    for (int v = 0; v < decltype(columns)::vecs; ++v) units[v] = U::at(f, h + v * kLanes);
    body(columns, h, units);
  };
  int64_t h = 0;
  for (; h + 4 * kLanes <= f.out; h += 4 * kLanes) call(ColumnBlock<4, false>(), h);
  for (; h + kLanes <= f.out; h += kLanes) call(ColumnBlock<1, false>(), h);
  if (h < f.out) call(ColumnBlock<1, true>(), h);
}

template <Activation kind, bool kNormalized, class T>
static void forward_units(const LayerParams<Accumulator<T>>& f, const T* x, int64_t stride_xn, T* out,
                          int64_t rows, bool non_temporal) {
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t H = f.out;
  const Tail<T> tail(static_cast<int>(H % kLanes));
  for_each_units<Units<kind, kNormalized, Accumulator<T>>, T>(
      f, [&](auto columns, int64_t h, const auto* units) __attribute__((always_inline)) {
        const bool lines = non_temporal && decltype(columns)::vecs * kLanes * sizeof(T) % kCacheLine == 0;
        for (int64_t n = 0; n < rows; ++n)
#pragma GCC unroll 4
          for (int v = 0; v < decltype(columns)::vecs; ++v) {
            const auto y = units[v].forward(columns.load(x + n * stride_xn + h, v, tail));
            if (lines && !decltype(columns)::tail)
              Traits<T>::store_non_temporal(out + n * H + h + v * kLanes, y);
            else
              columns.store(out + n * H + h, v, y, tail);
          }
      });
}

// A pass of the backward: sums alone, grad_x with the means taken away, or without.
constexpr int kSums = 0, kCentred = 1, kPlain = 2;

template <Activation kind, bool kNormalized, int kPass, class T>
static void backward_units(const LayerParams<Accumulator<T>>& f, const T* grad_out, int64_t stride_gn,
                           const T* x, int64_t stride_xn, T* grad_x, int64_t rows,
                           const LayerGrad<Accumulator<T>>& grad) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  constexpr bool kOnlySums = kPass == kSums;
  const int64_t H = f.out;
  const Tail<T> tail(static_cast<int>(H % kLanes));
  for_each_units<Units<kind, kNormalized, A>, T>(
      f, [&](auto columns, int64_t h, auto* units) __attribute__((always_inline)) {
        for (int64_t n = 0; n < rows; ++n)
#pragma GCC unroll 4
          for (int v = 0; v < decltype(columns)::vecs; ++v) {
            const auto grad_xv = units[v].template backward<kPass == kCentred>(
                columns.load(grad_out + n * stride_gn + h, v, tail),
                columns.load(x + n * stride_xn + h, v, tail));
            if (!kOnlySums) columns.store(grad_x + n * H + h, v, grad_xv, tail);
          }
#pragma GCC unroll 4
        for (int v = 0; v < decltype(columns)::vecs; ++v) {
          const auto add = [&](A* p, auto sum) {
            p += h + v * kLanes;
            Traits<A>::store(p, Traits<A>::load(p) + sum);
          };
          if (kind == Activation::leaky || kind == Activation::dice_batch_norm)
            add(grad.alpha, units[v].sum_alpha);
          if (kNormalized) {
            add(grad.sums[0], units[v].sum_e);
            add(grad.sums[1], units[v].sum_en);
          }
        }
      });
}

template <Activation activation, bool kNormalized_>
struct Kind {
  static constexpr Activation kind = activation;
  static constexpr bool normalized = kNormalized_;
};

// body(Kind) of a layer of any activation but dice.
template <class A, class Body>
RK_INLINE void with_kind(const LayerParams<A>& f, const Body& body) {
  if (f.activation == Activation::dice_batch_norm) return body(Kind<Activation::dice_batch_norm, true>());
  if (f.activation == Activation::relu)
    return f.r ? body(Kind<Activation::relu, true>()) : body(Kind<Activation::relu, false>());
  if (f.activation == Activation::sigmoid)
    return f.r ? body(Kind<Activation::sigmoid, true>()) : body(Kind<Activation::sigmoid, false>());
  f.r ? body(Kind<Activation::leaky, true>()) : body(Kind<Activation::leaky, false>());
}

// to [H] = from [H, up to whole vectors].
template <class T>
RK_INLINE void store_row(const Accumulator<T>* from, T* to, int64_t H, const Tail<T>& tail,
                         bool non_temporal) {
  if (!non_temporal) return narrow_row(from, to, H, tail);
  for (int64_t h = 0; h < H; h += Traits<T>::lanes)
    Traits<T>::store_non_temporal(to + h, Traits<Accumulator<T>>::load(from + h));
}

// g = n (or x) of rows of x.
template <class T>
RK_INLINE void load_block(const LayerParams<Accumulator<T>>& f, const T* x, int64_t stride_row, int64_t rows,
                          const Tail<T>& tail, const LayerScratch<Accumulator<T>>& s) {
  using X = Traits<Accumulator<T>>;
  using V = typename X::vec;
  const int64_t ld = padded<Accumulator<T>>(f.out);
  const auto *scale = f.g_scale, *shift = f.g_shift;
  for (int64_t r = 0; r < rows; ++r)
    widen_row(x + r * stride_row, s.g + r * ld, f.out, tail,
              [&](int64_t h, V v) __attribute__((always_inline)) {
                return scale ? v * X::load(scale + h) + X::load(shift + h) : v;
              });
}

}  // namespace norm

// A block's values are taken relative to its first row: as that is one of them, the sum of squares is at most
// rows + 1 times that of the deviations, however far from zero the mean is.
template <class T>
void norm_statistics(NormStatistics<T> a, Range rows, Accumulator<T>* memory, ColumnStats& stats) {
  using V = typename Traits<T>::vec;
  using A = Accumulator<T>;
  const int64_t H = a.H;
  A *sum = memory, *squares = sum + padded<A>(H);
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (int64_t n0 = rows.begin; n0 < rows.end; n0 += a.block) {
    const int64_t n = rows.end - n0 < a.block ? rows.end - n0 : a.block;
    const T* first = a.x + n0 * a.stride_row;
    for_each_column_block<T>(H, [&](auto columns, int64_t h) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(columns)::vecs;
      const auto load = [&](int64_t r, int v) __attribute__((always_inline)) {
        return columns.load(first + r * a.stride_row + h, v, tail);
      };
      V origin[kVecs], s[kVecs] = {}, q[kVecs] = {};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) origin[v] = load(0, v);
      for (int64_t r = 1; r < n; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const V relative = load(r, v) - origin[v];
          s[v] += relative;
          q[v] += relative * relative;
        }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Traits<A>::store(sum + h + v * Traits<A>::lanes, s[v]);
        Traits<A>::store(squares + h + v * Traits<A>::lanes, q[v]);
      }
    });
    const MergeRows merge(stats, n);
    for (int64_t h = 0; h < H; ++h) {
      const double mean = sum[h] / static_cast<double>(n);
      merge(stats, h, to_scalar(first[h]) + mean, squares[h] - sum[h] * mean);
    }
    stats.count = merge.count;
  }
}

template <class T>
void norm_activation(const NormActivation<T>& a, Range rows, const LayerScratch<Accumulator<T>>& s) {
  const LayerParams<Accumulator<T>>& f = a.layer;
  const int64_t H = f.out, ld = padded<Accumulator<T>>(H);
  const bool non_temporal = a.non_temporal && H * sizeof(T) % kCacheLine == 0;
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (int64_t n0 = rows.begin; n0 < rows.end; n0 += a.block) {
    const int64_t n = rows.end - n0 < a.block ? rows.end - n0 : a.block;
    if (f.activation != Activation::dice) {
      norm::with_kind(f, [&](auto k) __attribute__((always_inline)) {
        using K = decltype(k);
        norm::forward_units<K::kind, K::normalized>(f, a.x + n0 * a.stride_row, a.stride_row, a.out + n0 * H,
                                                    n, non_temporal);
      });
      continue;
    }
    norm::load_block(f, a.x + n0 * a.stride_row, a.stride_row, n, tail, s);
    activate(f, n, s, true);
    for (int64_t r = 0; r < n; ++r)
      norm::store_row(s.a + r * ld, a.out + (n0 + r) * H, H, tail, non_temporal);
  }
  if (non_temporal) fence_non_temporal();
}

template <class T>
void norm_activation_backward(const NormActivationBackward<T>& a, Range rows,
                              const NormScratch<Accumulator<T>>& s, const LayerGrad<Accumulator<T>>& grad) {
  const LayerParams<Accumulator<T>>& f = a.layer;
  const int64_t H = f.out, ld = padded<Accumulator<T>>(H);
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (int64_t n0 = rows.begin; n0 < rows.end; n0 += a.block) {
    const int64_t n = rows.end - n0 < a.block ? rows.end - n0 : a.block;
    const T *gp = a.grad_out + n0 * a.stride_grad, *xp = a.x + n0 * a.stride_row;
    T* grad_x = a.grad_x ? a.grad_x + n0 * H : a.grad_x;
    if (f.activation != Activation::dice) {
      norm::with_kind(f, [&](auto k) __attribute__((always_inline)) {
        using K = decltype(k);
        const auto run = [&](auto pass) __attribute__((always_inline)) {
          norm::backward_units<K::kind, K::normalized, decltype(pass)::value>(f, gp, a.stride_grad, xp,
                                                                              a.stride_row, grad_x, n, grad);
        };
        if constexpr (!K::normalized)
          run(Int<norm::kPlain>());
        else if (!grad_x)
          run(Int<norm::kSums>());
        else
          f.c1 ? run(Int<norm::kCentred>()) : run(Int<norm::kPlain>());
      });
      continue;
    }
    norm::load_block(f, xp, a.stride_row, n, tail, s.layer);
    activate(f, n, s.layer, false);
    for (int64_t r = 0; r < n; ++r) widen_row(gp + r * a.stride_grad, s.d + r * ld, H, tail);
    activation_backward(f, n, s.layer, s.d, !grad_x, s.grad_shift, grad);
    if (grad_x)
      for (int64_t r = 0; r < n; ++r) narrow_row(s.d + r * ld, grad_x + r * H, H, tail);
  }
}

#define RK_INSTANTIATE(T)                                                                                 \
  template void norm_statistics<T>(NormStatistics<T>, Range, Accumulator<T>*, ColumnStats&);              \
  template void norm_activation<T>(const NormActivation<T>&, Range, const LayerScratch<Accumulator<T>>&); \
  template void norm_activation_backward<T>(const NormActivationBackward<T>&, Range,                      \
                                            const NormScratch<Accumulator<T>>&,                           \
                                            const LayerGrad<Accumulator<T>>&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
