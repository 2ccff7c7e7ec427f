// The hidden layers of an MLP on a block of samples, in eval, for one instruction set.
//
//   h_0 = x,    h_i = relu(W_i h_{i-1} + b_i),    float32
//
// 2 in out flops a layer and sample. The block's activations and the weights stay in L2
// (26 x 16 + 13 -> 256 -> 128 and 64 samples: 0.2 and 0.6 MB).
#pragma once

#include "cpu/dense/params.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/math.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {
namespace hidden {

template <int kVecs>
RK_INLINE void columns(const float* x, int64_t stride_x, int64_t rows, float* y, int64_t stride_y, int64_t k,
                       int64_t depth, const float* b, int64_t ldb, const float* bias) {
  for (int64_t m = 0; m < rows; m += kGemmTileRows, y += kGemmTileRows * stride_y)
    gemm_tile<float, kGemmTileRows, kVecs, 0>(depth, {x + m * stride_x + k, stride_x, 1}, b, ldb, nullptr, y,
                                              stride_y, k ? y : bias, k ? stride_y : 0);
}

RK_INLINE void layer(const HiddenLayer& l, const float* x, int64_t stride_x, int64_t rows, float* y,
                     int64_t stride_y) {
  constexpr int64_t kLanes = Traits<float>::lanes;
  const int64_t parts = l.in > kMlpDepth ? (l.in + kMlpDepth - 1) / kMlpDepth : 1,
                most = (l.in + parts - 1) / parts;
  int64_t k = 0;
  do {  // once where there is no input: the bias
    const int64_t depth = l.in - k < most ? l.in - k : most;
    for (int64_t n0 = 0, width; n0 < l.out; n0 += width) {
      width = HiddenLayer::panel(l.out - n0);
      const float* panel = l.weight + n0 * l.in + k * width;
      for (int64_t n = 0, vecs; n < width; n += vecs * kLanes) {
        const int64_t rest = (width - n) / kLanes;
        vecs = rest == 1 ? 1 : rest == 2 || rest == 4 ? 2 : 3;
        const auto multiply = [&](auto count) __attribute__((always_inline)) {
          columns<decltype(count)::value>(x, stride_x, rows, y + n0 + n, stride_y, k, depth, panel + n, width,
                                          l.bias + n0 + n);
        };
        if (vecs == 1)
          multiply(Int<1>());
        else if (vecs == 2)
          multiply(Int<2>());
        else
          multiply(Int<3>());
      }
    }
    k += most;
  } while (k < l.in);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < l.out; n += kLanes) {
      float* p = y + m * stride_y + n;
      Traits<float>::store(p, relu(Traits<float>::load(p)));
    }
}

}  // namespace hidden

template <class T>
const T* hidden_layers(const HiddenLayers& a) {
  const int64_t rows = (a.rows + kGemmTileRows - 1) / kGemmTileRows * kGemmTileRows;
  const T* x = a.x;
  int64_t stride = a.stride_x;
  for (int64_t i = 0; i < a.num_layers; ++i) {
    hidden::layer(a.layers[i], x, stride, rows, a.hidden[i % 2], a.stride_hidden);
    x = a.hidden[i % 2];
    stride = a.stride_hidden;
  }
  return x;
}

template const float* hidden_layers<float>(const HiddenLayers&);

}  // namespace RK_ISA
}  // namespace rk
