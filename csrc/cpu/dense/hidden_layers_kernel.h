// The hidden layers of DeepFM's deep part on a block of samples, in eval, for one instruction set.
//
//   h_0 = [embeddings | dense],    h_i = relu(W_i h_{i-1} + b_i),    float32
//
// 2 in out flops a layer and sample. The block's activations and the weights stay in the second-level cache
// (26 x 16 + 13 -> 256 -> 128 and 64 samples: 0.2 and 0.6 MB), so memory has only the tables' rows to give,
// in lines all over them. All rows of a feature are asked for at once, while those of the feature before are
// copied: that has as many on their way as the processor can (5 ns a row). Asked for little by little between
// the tiles of the product before, they would hold up the product's own loads for longer than that: 5.7 ms
// instead of 5.4 for 4096 samples on one thread.
#pragma once

#include "deepfm_args.h"
#include "din_attention_gemm.h"

namespace rk {
namespace RK_ISA {
namespace deep {

constexpr int64_t kTileRows = RK_VECTOR_BYTES == 64 ? 8 : 4;  // as gemm_panel has them
constexpr int64_t kDepth = 144;  // rows of a panel, at most, that stay in the first-level cache

template <int kVecs>
RK_INLINE void columns(const HiddenLayer& layer, const float* x, int64_t stride_x, int64_t rows, float* y,
                       int64_t stride_y, int64_t k, int64_t depth, const float* b, int64_t ldb,
                       const float* bias) {
  for (int64_t m = 0; m < rows; m += kTileRows, y += kTileRows * stride_y)
    gemm_tile<float, kTileRows, kVecs, 0>(depth, {x + m * stride_x + k, stride_x, 1}, b, ldb, nullptr, y,
                                          stride_y, k ? y : bias, k ? stride_y : 0);
}

RK_INLINE void layer(const HiddenLayer& l, const float* x, int64_t stride_x, int64_t rows, float* y,
                     int64_t stride_y) {
  constexpr int64_t kLanes = Traits<float>::lanes;
  const int64_t parts = l.in > kDepth ? (l.in + kDepth - 1) / kDepth : 1, most = (l.in + parts - 1) / parts;
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
          columns<decltype(count)::value>(l, x, stride_x, rows, y + n0 + n, stride_y, k, depth, panel + n,
                                          width, l.bias + n0 + n);
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

}  // namespace deep

// Feature by feature, the rows of the next one on their way.
template <class T>
void look_up_block(const Lookups& a) {
  const auto row = [&](const Bags& bag, int64_t b) __attribute__((always_inline)) {
    const int64_t id =
        bag.wide_ids ? static_cast<const int64_t*>(bag.ids)[b] : static_cast<const int32_t*>(bag.ids)[b];
    return static_cast<const T*>(bag.weight) + id * bag.stride_wr;
  };
  const auto ask = [&](const Bags& bag) __attribute__((always_inline)) {
    for (int64_t b = a.b0; b < a.b1; ++b)
      for (int64_t d = 0; d < a.D; d += 64 / sizeof(T)) __builtin_prefetch(row(bag, b) + d);
  };
  ask(a.bags[0]);
  for (int64_t f = 0; f < a.F; ++f) {
    if (f + 1 < a.F) ask(a.bags[f + 1]);
    for (int64_t b = a.b0; b < a.b1; ++b) {
      const T* from = row(a.bags[f], b);
      T* to = a.x + (b - a.b0) * a.stride_x + f * a.D;
      int64_t d = 0;
      for (; d + Traits<T>::lanes <= a.D; d += Traits<T>::lanes)
        Traits<T>::store(to + d, Traits<T>::load(from + d));
      for (; d < a.D; ++d) to[d] = from[d];
    }
  }
}

// The last hidden layer's results for the block at x, in one of `hidden`.
template <class T>
const T* hidden_layers(const HiddenLayer* layers, int64_t n, const DeepBlock& block) {
  const int64_t rows = (block.rows + deep::kTileRows - 1) / deep::kTileRows * deep::kTileRows;
  const T* x = block.x;
  int64_t stride = block.stride_x;
  for (int64_t i = 0; i < n; ++i) {
    deep::layer(layers[i], x, stride, rows, block.hidden[i % 2], block.stride_hidden);
    x = block.hidden[i % 2];
    stride = block.stride_hidden;
  }
  return x;
}

template void look_up_block<float>(const Lookups&);
template const float* hidden_layers<float>(const HiddenLayer*, int64_t, const DeepBlock&);

}  // namespace RK_ISA
}  // namespace rk
