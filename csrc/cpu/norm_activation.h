// Batch normalization and activation of a hidden layer's products, forward and backward, for one instruction
// set.
//
// x [N, H] has a row a sample and a column a unit. With m and v the mean and variance of a column, those of
// the batch in training, and r = 1 / sqrt(v + eps),
//
//   n = (x - m) r,    out = activation(gamma n + beta)                          any activation but the last:
//                     out = x (alpha + (1 - alpha) sigmoid(gamma n + beta))     dice_batch_norm
//
// and without a normalization out = activation(x). The activations and their derivatives are those of
// din_attention_activation.h. Backward, with e = dL/dn and, for dice_batch_norm, d what of dL/dx goes past
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
// for dice, forward and backward; memory is the bound.
#pragma once

#include "columns.h"
#include "din_attention_activation.h"

namespace rk {
namespace RK_ISA {
namespace norm {

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
RK_INLINE void store_row(const Accumulator<T>* from, T* to, int64_t H, const Tail<T>& tail) {
  using A = Accumulator<T>;
  int64_t h = 0;
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
// as Chan, Golub and LeVeque (1983) do, and a block's deviations are from its rounded mean, whose error their
// sum corrects, so that the variance loses nothing to the mean. `memory` is of 3 padded(H) values.
template <class T>
void norm_statistics(const T* x, int64_t stride_xn, int64_t n0, int64_t n1, int64_t H, int64_t block,
                     Accumulator<T>* memory, DinStats& stats) {
  using V = typename Traits<T>::vec;
  using A = Accumulator<T>;
  A *mean = memory, *sum = mean + padded<A>(H), *squares = sum + padded<A>(H);
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (; n0 < n1; n0 += block) {
    const int64_t rows = n1 - n0 < block ? n1 - n0 : block;
    for_each_column_block<T>(H, [&](auto columns, int64_t h) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(columns)::vecs;
      const auto load = [&](int64_t r, int v) __attribute__((always_inline)) {
        const T* p = x + (n0 + r) * stride_xn + h + v * Traits<T>::lanes;
        return decltype(columns)::tail && v == kVecs - 1 ? tail.load(p) : Traits<T>::load(p);
      };
      V m[kVecs] = {}, s[kVecs] = {}, q[kVecs] = {};
      for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) m[v] += load(r, v);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) m[v] /= static_cast<A>(rows);
      for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          const V centred = load(r, v) - m[v];
          s[v] += centred;
          q[v] += centred * centred;
        }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        Traits<A>::store(mean + h + v * Traits<A>::lanes, m[v]);
        Traits<A>::store(sum + h + v * Traits<A>::lanes, s[v]);
        Traits<A>::store(squares + h + v * Traits<A>::lanes, q[v]);
      }
    });
    const double count = stats.count + rows, share = rows / count, between = stats.count * share;
    for (int64_t h = 0; h < H; ++h) {
      const double error = sum[h] / static_cast<double>(rows), delta = mean[h] + error - stats.mean[h];
      stats.mean[h] += delta * share;
      stats.deviation[h] += squares[h] - sum[h] * error + delta * delta * between;
    }
    stats.count = count;
  }
}

// Rows [n0, n1), `block` at a time. x has unit stride along H, out [N, H] is contiguous.
template <class T>
void norm_activation(const DinLayer<Accumulator<T>>& f, const T* x, int64_t stride_xn, T* out, int64_t n0,
                     int64_t n1, int64_t block, const DinLayerScratch<Accumulator<T>>& s) {
  const int64_t H = f.out, ld = padded<Accumulator<T>>(H);
  const Tail<T> tail(static_cast<int>(H % Traits<T>::lanes));
  for (; n0 < n1; n0 += block) {
    const int64_t rows = n1 - n0 < block ? n1 - n0 : block;
    norm::load_block(f, x + n0 * stride_xn, stride_xn, rows, tail, s);
    activate(f, rows, s, true);
    for (int64_t r = 0; r < rows; ++r) norm::store_row(s.a + r * ld, out + (n0 + r) * H, H, tail);
  }
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
    norm::load_block(f, x + n0 * stride_xn, stride_xn, rows, tail, s);
    activate(f, rows, s, f.activation == DinActivation::sigmoid);
    for (int64_t r = 0; r < rows; ++r)
      norm::load_row<T>(grad_out + (n0 + r) * stride_gn, d + r * ld, H, tail, nullptr, nullptr);
    activation_backward(f, rows, s, d, !grad_x, grad_shift, grad);
    if (grad_x)
      for (int64_t r = 0; r < rows; ++r) norm::store_row(d + r * ld, grad_x + (n0 + r) * H, H, tail);
  }
}

#define RK_INSTANTIATE(T)                                                                                    \
  template void norm_statistics<T>(const T*, int64_t, int64_t, int64_t, int64_t, int64_t, Accumulator<T>*,   \
                                   DinStats&);                                                               \
  template void norm_activation<T>(const DinLayer<Accumulator<T>>&, const T*, int64_t, T*, int64_t, int64_t, \
                                   int64_t, const DinLayerScratch<Accumulator<T>>&);                         \
  template void norm_activation_backward<T>(const DinLayer<Accumulator<T>>&, const T*, int64_t, const T*,    \
                                            int64_t, T*, int64_t, int64_t, int64_t,                          \
                                            const DinLayerScratch<Accumulator<T>>&, Accumulator<T>*,         \
                                            Accumulator<T>*, const DinLayerGrad<Accumulator<T>>&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
