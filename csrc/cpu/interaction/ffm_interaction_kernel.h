// Field-aware interactions: each field has an embedding for every other field. For one instruction set.
//
// x [B, F, F, D], x_fg field f's embedding for field g; f < g
//
//   out[b, (f, g)] = x_fg x_gf                            elementwise, or summed over D with reduce_sum
//   grad_x_fg = grad_out[b, (f, g)] x_gf     grad_x_gf = grad_out[b, (f, g)] x_fg     grad_x_ff = 0
//
// Per sample: F (F - 1) D reads, F (F - 1) / 2 D writes, or F (F - 1) / 2; backward as many reads and those
// of grad_out, F F D writes. Bound by memory: what is large is stored non-temporally.
#pragma once

#include "cpu/interaction/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

template <class T, class Block>
RK_INLINE void store_block(Block, T* p, int v, typename Traits<T>::vec x, const Tail<T>& tail,
                           bool non_temporal) {
  if (non_temporal && !Block::tail)
    Traits<T>::store_non_temporal(p + v * Traits<T>::lanes, x);
  else
    Block::store(p, v, x, tail);
}

template <class T>
void ffm_interaction(FfmInteraction<T> a, Range samples) {
  using V = typename Traits<T>::vec;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  T* out = a.out + samples.begin * (a.F * (a.F - 1) / 2) * (a.reduce_sum ? 1 : a.D);
  for (int64_t b = samples.begin; b < samples.end; ++b)
    for (int64_t f = 0; f < a.F; ++f)
      for (int64_t g = f + 1; g < a.F; ++g) {
        const T* sample = a.x + b * a.stride_sample;
        const T *x = sample + f * a.stride_field + g * a.stride_other,
                *y = sample + g * a.stride_field + f * a.stride_other;
        V total = {};
        for_each_column_block<T>(a.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int v = 0; v < decltype(block)::vecs; ++v) {
            const V product = block.load(x + d, v, tail) * block.load(y + d, v, tail);
            if (a.reduce_sum)
              total += product;
            else
              store_block(block, out + d, v, product, tail, a.non_temporal);
          }
        });
        if (a.reduce_sum) assign(*out, sum_lanes<Accumulator<T>>(total));
        out += a.reduce_sum ? 1 : a.D;
      }
  if (a.non_temporal) fence_non_temporal();
}

template <class T>
void ffm_interaction_backward(FfmInteractionBackward<T> a, Range samples) {
  using V = typename Traits<T>::vec;
  const FfmInteraction<T>& of = a.forward;
  const int64_t F = of.F, D = of.D;
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t b = samples.begin; b < samples.end; ++b) {
    const T *sample = of.x + b * of.stride_sample, *grad = a.grad_out + b * a.stride_grad;
    T* to = a.grad_x + b * F * F * D;
    for (int64_t f = 0; f < F; ++f) {
      for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
        for (int v = 0; v < decltype(block)::vecs; ++v)
          store_block(block, to + (f * F + f) * D + d, v, V{}, tail, of.non_temporal);
      });
      for (int64_t g = f + 1; g < F; ++g, grad += a.stride_pair) {
        const int64_t fg = f * of.stride_field + g * of.stride_other,
                      gf = g * of.stride_field + f * of.stride_other;
        for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int v = 0; v < decltype(block)::vecs; ++v) {
            const V gv = of.reduce_sum ? splat<T>(to_scalar(*grad)) : block.load(grad + d, v, tail);
            store_block(block, to + (f * F + g) * D + d, v, gv * block.load(sample + gf + d, v, tail), tail,
                        of.non_temporal);
            store_block(block, to + (g * F + f) * D + d, v, gv * block.load(sample + fg + d, v, tail), tail,
                        of.non_temporal);
          }
        });
      }
    }
  }
  if (of.non_temporal) fence_non_temporal();
}

#define RK_INSTANTIATE(T)                                     \
  template void ffm_interaction<T>(FfmInteraction<T>, Range); \
  template void ffm_interaction_backward<T>(FfmInteractionBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
