// The hidden layers of DeepFM's deep part on a block of samples, in eval, for one instruction set.
//
//   h_0 = [embeddings | dense],    h_i = relu(W_i h_{i-1} + b_i),    float32
//
// 2 in out flops a layer and sample. The block's activations and the weights stay in the second-level cache
// (26 x 16 + 13 -> 256 -> 128 and 64 samples: 0.2 and 0.6 MB), so memory has only the tables' rows to give,
// in lines all over them, and those of the next block are asked for while this one is multiplied: a few
// before each tile of the product, because a burst would fill the queue of misses and the product's own loads
// wait behind it.
#pragma once

#include "deepfm_args.h"
#include "din_attention_gemm.h"

#define RK_MEMBER __attribute__((always_inline))

namespace rk {
namespace RK_ISA {
namespace deep {

// The rows of a block's lookups, a few at a time, in the order of features and then samples.
class Cursor {
 public:
  RK_MEMBER Cursor(const Lookups& a) : a_(a), b_(a.b0) {}
  // body(row, place in the block's x) for the next n rows.
  template <class Body>
  RK_MEMBER void advance(int64_t n, const Body& body) {
    for (; n > 0 && f_ < a_.F; ++f_, b_ = a_.b0) {
      const Bags& bag = a_.bags[f_];
      const float* weight = static_cast<const float*>(bag.weight);
      const int64_t end = n < a_.b1 - b_ ? b_ + n : a_.b1;
      n -= end - b_;
      for (; b_ < end; ++b_) {
        const int64_t id = bag.wide_ids ? static_cast<const int64_t*>(bag.ids)[b_]
                                        : static_cast<const int32_t*>(bag.ids)[b_];
        body(weight + id * bag.stride_wr, a_.x + (b_ - a_.b0) * a_.stride_x + f_ * a_.D);
      }
      if (b_ < a_.b1) return;
    }
  }

 private:
  const Lookups& a_;
  int64_t f_ = 0, b_;
};

// Copies rows that it asked for a call ago.
class Gather {
 public:
  RK_MEMBER Gather(const Lookups& a, int64_t calls) : D_(a.D), ask_(a), copy_(a) {
    each_ = (a.F * (a.b1 - a.b0) + calls - 1) / calls;
    ask();
  }
  RK_MEMBER void some() {
    ask();
    copy_.advance(each_, [&](const float* row, float* x) __attribute__((always_inline)) {
      int64_t d = 0;
      for (; d + Traits<float>::lanes <= D_; d += Traits<float>::lanes)
        Traits<float>::store(x + d, Traits<float>::load(row + d));
      for (; d < D_; ++d) x[d] = row[d];
    });
  }

 private:
  RK_MEMBER void ask() {
    ask_.advance(each_, [&](const float* row, float*) __attribute__((always_inline)) {
      for (int64_t d = 0; d < D_; d += 16) __builtin_prefetch(row + d);
    });
  }
  int64_t D_, each_;
  Cursor ask_, copy_;
};

constexpr int64_t kTileRows = RK_VECTOR_BYTES == 64 ? 8 : 4;  // as gemm_panel has them
constexpr int64_t kDepth = 144;  // rows of a panel, at most, that stay in the first-level cache

template <int kVecs>
RK_INLINE void columns(const HiddenLayer& layer, const float* x, int64_t stride_x, int64_t rows, float* y,
                       int64_t stride_y, int64_t k, int64_t depth, const float* b, int64_t ldb,
                       const float* bias, Gather& next) {
  for (int64_t m = 0; m < rows; m += kTileRows, y += kTileRows * stride_y) {
    next.some();
    gemm_tile<float, kTileRows, kVecs, 0>(depth, {x + m * stride_x + k, stride_x, 1}, b, ldb, nullptr, y,
                                          stride_y, k ? y : bias, k ? stride_y : 0);
  }
}

RK_INLINE void layer(const HiddenLayer& l, const float* x, int64_t stride_x, int64_t rows, float* y,
                     int64_t stride_y, Gather& next) {
  constexpr int64_t kLanes = Traits<float>::lanes;
  const int64_t parts = (l.in + kDepth - 1) / kDepth, most = (l.in + parts - 1) / parts;
  for (int64_t k = 0; k < l.in; k += most) {
    const int64_t depth = l.in - k < most ? l.in - k : most;
    for (int64_t n0 = 0, width; n0 < l.out; n0 += width) {
      width = HiddenLayer::panel(l.out - n0);
      const float* panel = l.weight + n0 * l.in + k * width;
      for (int64_t n = 0, vecs; n < width; n += vecs * kLanes) {
        const int64_t rest = (width - n) / kLanes;
        vecs = rest == 1 ? 1 : rest == 2 || rest == 4 ? 2 : 3;
        const auto multiply = [&](auto count) __attribute__((always_inline)) {
          columns<decltype(count)::value>(l, x, stride_x, rows, y + n0 + n, stride_y, k, depth, panel + n,
                                          width, l.bias + n0 + n, next);
        };
        if (vecs == 1)
          multiply(Int<1>());
        else if (vecs == 2)
          multiply(Int<2>());
        else
          multiply(Int<3>());
      }
    }
  }
  using V = Traits<float>::vec;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = 0; n < l.out; n += kLanes) {
      float* p = y + m * stride_y + n;
      const V v = Traits<float>::load(p);
      Traits<float>::store(p, v < 0 ? V{} : v);  // NaN stays
    }
}

}  // namespace deep

// Rows of x that nothing covers.
template <class T>
void look_up_block(const Lookups& block) {
  constexpr int64_t kEach = 32;  // on their way at once
  const int64_t calls = (block.F * (block.b1 - block.b0) + kEach - 1) / kEach;
  if (calls == 0) return;
  deep::Gather gather(block, calls);
  for (int64_t i = 0; i < calls; ++i) gather.some();
}

// The last hidden layer's results for the block at x, in one of `hidden`; `next` is looked up meanwhile.
template <class T>
const T* hidden_layers(const HiddenLayer* layers, int64_t n, const DeepBlock& block, const Lookups& next) {
  const int64_t rows = (block.rows + deep::kTileRows - 1) / deep::kTileRows * deep::kTileRows;
  int64_t tiles = 0;  // at least
  for (int64_t i = 0; i < n; ++i)
    tiles += (layers[i].in + deep::kDepth - 1) / deep::kDepth * ((layers[i].out + 47) / 48) *
             (rows / deep::kTileRows);
  deep::Gather gather(next, tiles);
  const float* x = block.x;
  int64_t stride = block.stride_x;
  for (int64_t i = 0; i < n; ++i) {
    deep::layer(layers[i], x, stride, rows, block.hidden[i % 2], block.stride_hidden, gather);
    x = block.hidden[i % 2];
    stride = block.stride_hidden;
  }
  return x;
}

template void look_up_block<float>(const Lookups&);
template const float* hidden_layers<float>(const HiddenLayer*, int64_t, const DeepBlock&, const Lookups&);

}  // namespace RK_ISA
}  // namespace rk

#undef RK_MEMBER
