// Batch normalization and activation of a hidden layer's products, forward and backward, for one instruction
// set.
//
// x [N, H] has a row a sample and a column a unit. With m and v the mean and variance of a column, those of
// the batch in training, and r = 1 / sqrt(v + eps),
//
//   n = (x - m) r,    out = activation(gamma n + beta)                          any activation but the last:
//                     out = alpha x + sigmoid(gamma n + beta) (x - alpha x)     dice_batch_norm
//
// and without a normalization out = activation(x). Dice, whose statistics run along a row, goes through the
// blocks of rows of dense/activation_kernel.h; the units of the others do not know of each other and go from
// memory to memory, a few vectors of columns at a time (21 to 40 % faster forward and backward than through
// the blocks, AMD Zen 5). Backward, with e = dL/dn and, for dice_batch_norm, d what of dL/dx goes past
// the normalization (0 else), in training
//
//   grad_x = d + r (e - mean(e) - n mean(e n)),    grad_gamma = sum n dL/d(gamma n + beta),    grad_beta =
//   its sum
//
// where means and sums run down a column; in eval the two means are absent.
//
// Passes over an array of x's size. Training with a normalization: forward read x for the statistics, read x,
// write out; backward read x and grad_out for the sums, read both, write grad_x: 8 in all, where torch's
// normalization and activation need 10 (relu) to about 50 (dice in plain operations). Without statistics of
// the batch: forward 2, backward 3. Nothing of x's size is kept but x. Flops: about 10 a value for relu, 60
// for dice, forward and backward; memory is the bound. A large out is stored past the caches, 1.05 to 1.4
// times as fast forward, and no slower with its reader (65536 x 256, two Zen 3 cores); grad_x gained nothing
// from it.
#pragma once

#include "cpu/dense/activation_kernel.h"
#include "cpu/dense/params.h"
#include "cpu/simd/accumulator.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace norm {

// What one vector of columns knows of itself, and its sums over the rows. Absent columns are zero in the
// constants.
template <DinActivation kind, bool kNormalized, class A>
struct Units {
  using X = Traits<A>;
  using V = typename X::vec;

  RK_INLINE Units at(const DinLayer<A>& f, int64_t h) {
    const auto constant = [&](const A* p) { return p ? X::load(p + h) : V{}; };
    return {constant(f.g_scale), constant(f.g_shift), constant(f.y_scale), constant(f.y_shift),
            constant(f.alpha),   constant(f.r),       constant(f.c1),      constant(f.c2)};
  }

  V forward(V x) const {
    const V v = argument(normalized(x));
    if (kind == DinActivation::leaky) return v > 0 ? v : v * alpha;
    if (kind == DinActivation::relu) return relu(v);
    if (kind == DinActivation::sigmoid) return sigmoid(v);
    const V ax = alpha * x;
    return ax + sigmoid(v) * (x - ax);
  }

  // dL/dout -> dL/dx; adds to the sums. In eval nothing is taken away: 0 times an infinite n would be NaN.
  template <bool kMeans>
  V backward(V grad, V x) {
    const V n = normalized(x), v = argument(n);
    V e, d = {};
    if (kind == DinActivation::leaky) {
      e = v > 0 ? grad : grad * alpha;
      sum_alpha += v > 0 ? V{} : grad * v;
    } else if (kind == DinActivation::relu) {
      e = relu_backward(grad, v);
    } else {
      const V p = sigmoid(v), slope = p - p * p;
      if (kind == DinActivation::sigmoid) {
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
RK_INLINE void for_each_units(const DinLayer<Accumulator<T>>& f, const Body& body) {
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

template <DinActivation kind, bool kNormalized, class T>
static void forward_units(const DinLayer<Accumulator<T>>& f, const T* x, int64_t stride_xn, T* out,
                          int64_t rows, bool streamed) {
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t H = f.out;
  const Tail<T> tail(static_cast<int>(H % kLanes));
  for_each_units<Units<kind, kNormalized, Accumulator<T>>, T>(
      f, [&](auto columns, int64_t h, const auto* units) __attribute__((always_inline)) {
        const bool lines = streamed && decltype(columns)::vecs * kLanes * sizeof(T) % kCacheLine == 0;
        for (int64_t n = 0; n < rows; ++n)
#pragma GCC unroll 4
          for (int v = 0; v < decltype(columns)::vecs; ++v) {
            const T* xp = x + n * stride_xn + h + v * kLanes;
            T* to = out + n * H + h + v * kLanes;
            if (decltype(columns)::tail)
              tail.store(to, units[v].forward(tail.load(xp)));
            else if (lines)
              Traits<T>::stream(to, units[v].forward(Traits<T>::load(xp)));
            else
              Traits<T>::store(to, units[v].forward(Traits<T>::load(xp)));
          }
      });
}

// What a pass of the backward is for: sums alone, or grad_x, by the means that these are of or without.
constexpr int kSums = 0, kCentred = 1, kPlain = 2;

template <DinActivation kind, bool kNormalized, int kPass, class T>
static void backward_units(const DinLayer<Accumulator<T>>& f, const T* grad_out, int64_t stride_gn,
                           const T* x, int64_t stride_xn, T* grad_x, int64_t rows,
                           const DinLayerGrad<Accumulator<T>>& grad) {
  using A = Accumulator<T>;
  constexpr int64_t kLanes = Traits<T>::lanes;
  constexpr bool kOnlySums = kPass == kSums;
  const int64_t H = f.out;
  const Tail<T> tail(static_cast<int>(H % kLanes));
  for_each_units<Units<kind, kNormalized, A>, T>(f, [&](auto columns, int64_t h,
                                                        auto* units) __attribute__((always_inline)) {
    for (int64_t n = 0; n < rows; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < decltype(columns)::vecs; ++v) {
        const T *gp = grad_out + n * stride_gn + h + v * kLanes, *xp = x + n * stride_xn + h + v * kLanes;
        T* to = grad_x + n * H + h + v * kLanes;
        if (decltype(columns)::tail) {
          const auto grad_xv = units[v].template backward<kPass == kCentred>(tail.load(gp), tail.load(xp));
          if (!kOnlySums) tail.store(to, grad_xv);
        } else {
          const auto grad_xv =
              units[v].template backward<kPass == kCentred>(Traits<T>::load(gp), Traits<T>::load(xp));
          if (!kOnlySums) Traits<T>::store(to, grad_xv);
        }
      }
#pragma GCC unroll 4
    for (int v = 0; v < decltype(columns)::vecs; ++v) {
      const auto add = [&](A* p, auto sum) {
        p += h + v * kLanes;
        Traits<A>::store(p, Traits<A>::load(p) + sum);
      };
      if (kind == DinActivation::leaky || kind == DinActivation::dice_batch_norm)
        add(grad.alpha, units[v].sum_alpha);
      if (kNormalized) {
        add(grad.sums[0], units[v].sum_e);
        add(grad.sums[1], units[v].sum_en);
      }
    }
  });
}

template <DinActivation activation, bool kNormalized_>
struct Kind {
  static constexpr DinActivation kind = activation;
  static constexpr bool normalized = kNormalized_;
};

// body(Kind) of a layer of any activation but dice.
template <class A, class Body>
RK_INLINE void with_kind(const DinLayer<A>& f, const Body& body) {
  if (f.activation == DinActivation::dice_batch_norm)
    return body(Kind<DinActivation::dice_batch_norm, true>());
  if (f.activation == DinActivation::relu)
    return f.r ? body(Kind<DinActivation::relu, true>()) : body(Kind<DinActivation::relu, false>());
  if (f.activation == DinActivation::sigmoid)
    return f.r ? body(Kind<DinActivation::sigmoid, true>()) : body(Kind<DinActivation::sigmoid, false>());
  f.r ? body(Kind<DinActivation::leaky, true>()) : body(Kind<DinActivation::leaky, false>());
}

// A row as accumulators with absent columns zero; through affine, a -> scale a + shift, if there is one.
template <class T>
RK_INLINE void load_row(const T* from, Accumulator<T>* to, int64_t H, const Tail<T>& tail,
                        const Accumulator<T>* scale, const Accumulator<T>* shift) {
  using A = Accumulator<T>;
  using X = Traits<A>;
  int64_t h = 0;
  const auto put = [&](typename X::vec v) __attribute__((always_inline)) {
    X::store(to + h, scale ? v * X::load(scale + h) + X::load(shift + h) : v);
  };
  for (; h + X::lanes <= H; h += X::lanes) put(Traits<T>::load(from + h));
  if (h < H) put(tail.load(from + h));
}

template <class T>
RK_INLINE void store_row(const Accumulator<T>* from, T* to, int64_t H, const Tail<T>& tail, bool streamed) {
  using A = Accumulator<T>;
  int64_t h = 0;
  if (streamed)
    for (; h < H; h += Traits<T>::lanes) Traits<T>::stream(to + h, Traits<A>::load(from + h));
  for (; h + Traits<T>::lanes <= H; h += Traits<T>::lanes)
    Traits<T>::store(to + h, Traits<A>::load(from + h));
  if (h < H) tail.store(to + h, Traits<A>::load(from + h));
}

// g = n (or x), and what the activation's backward needs of its forward: dice's statistics, sigmoid's values.
template <class T>
RK_INLINE void load_block(const DinLayer<Accumulator<T>>& f, const T* x, int64_t stride_xn, int64_t rows,
                          const Tail<T>& tail, const DinLayerScratch<Accumulator<T>>& s) {
  const int64_t ld = padded<Accumulator<T>>(f.out);
  for (int64_t r = 0; r < rows; ++r)
    load_row(x + r * stride_xn, s.g + r * ld, f.out, tail, f.g_scale, f.g_shift);
}

}  // namespace norm

// Mean and sum of squared deviations of each column over rows [n0, n1), `block` at a time: blocks are merged
// as Chan, Golub and LeVeque (1983) do. A block's values are taken relative to its first row: as that is one
// of them, the sum of squares is at most rows + 1 times that of the deviations, however far from zero the
// mean is. `memory` is of 2 padded(H) values.
template <class T>
void norm_statistics(const T* x, int64_t stride_xn, int64_t n0, int64_t n1, int64_t H, int64_t block,
                     Accumulator<T>* memory, DinStats& stats) {
  using V = typename Traits<T>::vec;
  using A = Accumulator<T>;
  A *sum = memory, *squares = sum + padded<A>(H);
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (; n0 < n1; n0 += block) {
    const int64_t rows = n1 - n0 < block ? n1 - n0 : block;
    const T* first = x + n0 * stride_xn;
    for_each_column_block<T>(H, [&](auto columns, int64_t h) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(columns)::vecs;
      const auto load = [&](int64_t r, int v) __attribute__((always_inline)) {
        const T* p = first + r * stride_xn + h + v * Traits<T>::lanes;
        return decltype(columns)::tail && v == kVecs - 1 ? tail.load(p) : Traits<T>::load(p);
      };
      V origin[kVecs], s[kVecs] = {}, q[kVecs] = {};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) origin[v] = load(0, v);
      for (int64_t r = 1; r < rows; ++r)
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
    const double count = stats.count + rows, share = rows / count, between = stats.count * share;
    for (int64_t h = 0; h < H; ++h) {
      const double mean = sum[h] / static_cast<double>(rows),
                   delta = to_scalar(first[h]) + mean - stats.mean[h];
      stats.mean[h] += delta * share;
      stats.deviation[h] += squares[h] - sum[h] * mean + delta * delta * between;
    }
    stats.count = count;
  }
}

// Rows [n0, n1), `block` at a time. x has unit stride along H, out [N, H] is contiguous, and stored past the
// caches if `streamed` and its rows are whole cache lines.
template <class T>
void norm_activation(const DinLayer<Accumulator<T>>& f, const T* x, int64_t stride_xn, T* out, bool streamed,
                     int64_t n0, int64_t n1, int64_t block, const DinLayerScratch<Accumulator<T>>& s) {
  const int64_t H = f.out, ld = padded<Accumulator<T>>(H);
  streamed &= H * sizeof(T) % kCacheLine == 0;
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (; n0 < n1; n0 += block) {
    const int64_t rows = n1 - n0 < block ? n1 - n0 : block;
    if (f.activation != DinActivation::dice) {
      norm::with_kind(f, [&](auto k) __attribute__((always_inline)) {
        using K = decltype(k);
        norm::forward_units<K::kind, K::normalized>(f, x + n0 * stride_xn, stride_xn, out + n0 * H, rows,
                                                    streamed);
      });
      continue;
    }
    norm::load_block(f, x + n0 * stride_xn, stride_xn, rows, tail, s);
    activate(f, rows, s, true);
    for (int64_t r = 0; r < rows; ++r) norm::store_row(s.a + r * ld, out + (n0 + r) * H, H, tail, streamed);
  }
  if (streamed) end_of_stream();
}

// Adds to the sums and alpha's gradient in `grad`; writes grad_x [N, H], contiguous, unless it is null. d and
// grad_shift are memory of [block, padded(H)] and [padded(H)].
template <class T>
void norm_activation_backward(const DinLayer<Accumulator<T>>& f, const T* grad_out, int64_t stride_gn,
                              const T* x, int64_t stride_xn, T* grad_x, int64_t n0, int64_t n1, int64_t block,
                              const DinLayerScratch<Accumulator<T>>& s, Accumulator<T>* d,
                              Accumulator<T>* grad_shift, const DinLayerGrad<Accumulator<T>>& grad) {
  const int64_t H = f.out, ld = padded<Accumulator<T>>(H);
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (; n0 < n1; n0 += block) {
    const int64_t rows = n1 - n0 < block ? n1 - n0 : block;
    if (f.activation != DinActivation::dice) {
      const T *gp = grad_out + n0 * stride_gn, *xp = x + n0 * stride_xn;
      norm::with_kind(f, [&](auto k) __attribute__((always_inline)) {
        using K = decltype(k);
        const auto run = [&](auto pass) __attribute__((always_inline)) {
          norm::backward_units<K::kind, K::normalized, decltype(pass)::value>(
              f, gp, stride_gn, xp, stride_xn, grad_x ? grad_x + n0 * H : grad_x, rows, grad);
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
    norm::load_block(f, x + n0 * stride_xn, stride_xn, rows, tail, s);
    activate(f, rows, s, false);
    for (int64_t r = 0; r < rows; ++r)
      norm::load_row<T>(grad_out + (n0 + r) * stride_gn, d + r * ld, H, tail, nullptr, nullptr);
    activation_backward(f, rows, s, d, !grad_x, grad_shift, grad);
    if (grad_x)
      for (int64_t r = 0; r < rows; ++r) norm::store_row(d + r * ld, grad_x + (n0 + r) * H, H, tail, false);
  }
}

#define RK_INSTANTIATE(T)                                                                                  \
  template void norm_statistics<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, Accumulator<T>*, \
                                   DinStats&);                                                             \
  template void norm_activation<T>(const DinLayer<Accumulator<T>>&, const T*, int64_t, T*, bool, int64_t,  \
                                   int64_t, int64_t, const DinLayerScratch<Accumulator<T>>&);              \
  template void norm_activation_backward<T>(const DinLayer<Accumulator<T>>&, const T*, int64_t, const T*,  \
                                            int64_t, T*, int64_t, int64_t, int64_t,                        \
                                            const DinLayerScratch<Accumulator<T>>&, Accumulator<T>*,       \
                                            Accumulator<T>*, const DinLayerGrad<Accumulator<T>>&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
