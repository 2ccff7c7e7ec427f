// What the kernel of deepfm.h is given.
#pragma once

#include "embedding_bag_args.h"

namespace rk {

// A hidden layer, relu(W x + b). `out` is a multiple of kColumns; the columns added are zeros. W^T [in, out]
// lies in panels of columns, one behind the other, each contiguous: that of column n0 begins at n0 in.
struct HiddenLayer {
  static constexpr int64_t kColumns = 16;
  static __attribute__((always_inline)) int64_t whole(int64_t columns) {
    return (columns + kColumns - 1) / kColumns * kColumns;
  }
  const float *weight, *bias;
  int64_t in, out;

  // How wide a panel is, of so many columns left: 48, three vectors of AVX-512, but rather 32 twice than 48
  // and 16, because a product with one vector has more operands to load than multiplications to do.
  static __attribute__((always_inline)) int64_t panel(int64_t left) {
    return left == 64 ? 32 : left < 48 ? left : 48;
  }
};

// Samples [b0, b1), kRows or fewer, of F features with one id each: rows of D values side by side, to be x
// [., F D].
struct Lookups {
  static constexpr int64_t kRows = 64;
  const Bags* bags;
  int64_t F, D, b0, b1;
  float* x;
  int64_t stride_x;
};

// A block's activations: the lookups and dense columns, and room for the hidden layers' results by turns.
struct DeepBlock {
  const float* x;
  float* hidden[2];
  int64_t stride_x, stride_hidden, rows;
};

}  // namespace rk
