// What follows the product of a layer of DCN v2, for one instruction set.
//
//   out = x0 product + bias + x                 elementwise, product = W x from a library's GEMM
//   grad_x0   = grad_out product         grad_product = grad_out x0
//   grad_bias = sum_rows grad_out        grad_x       = grad_out
//
// Per row of D values: forward three reads and one write, where torch's three ops have five and three;
// backward three reads and two writes. Bound by memory.
#pragma once

#include "cpu/interaction/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

template <class T>
void cross_layer(CrossLayer<T> a, Range rows) {
  using X = Traits<Accumulator<T>>;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_each_column_block<T>(a.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      const T *x0 = a.x0 + row * a.stride_x0 + d, *product = a.product + row * a.stride_product + d,
              *x = a.x + row * a.stride_x + d;
#pragma GCC unroll 4
      for (int v = 0; v < decltype(block)::vecs; ++v) {
        auto out = block.load(x0, v, tail) * block.load(product, v, tail) + block.load(x, v, tail);
        if (a.bias) out += X::load(a.bias + d + v * X::lanes);
        block.store(a.out + row * a.D + d, v, out, tail);
      }
    });
}

template <class T>
void cross_layer_backward(CrossLayerBackward<T> a, Range rows) {
  using X = Traits<Accumulator<T>>;
  const Tail<T> tail(static_cast<int>(a.D % Traits<T>::lanes));
  for (int64_t row = rows.begin; row < rows.end; ++row)
    for_each_column_block<T>(a.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      const T *g = a.grad_out + row * a.stride_grad + d, *x0 = a.x0 + row * a.stride_x0 + d,
              *product = a.product + row * a.stride_product + d;
#pragma GCC unroll 4
      for (int v = 0; v < decltype(block)::vecs; ++v) {
        const auto grad = block.load(g, v, tail);
        block.store(a.grad_x0 + row * a.D + d, v, grad * block.load(product, v, tail), tail);
        block.store(a.grad_product + row * a.D + d, v, grad * block.load(x0, v, tail), tail);
        if (a.sum_out) {
          Accumulator<T>* sum = a.sum_out + d + v * X::lanes;
          X::store(sum, X::load(sum) + grad);
        }
      }
    });
}

#define RK_INSTANTIATE(T)                             \
  template void cross_layer<T>(CrossLayer<T>, Range); \
  template void cross_layer_backward<T>(CrossLayerBackward<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
