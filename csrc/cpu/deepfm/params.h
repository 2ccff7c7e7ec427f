// What the kernel of look_up_block_kernel.h is given.
#pragma once

#include "cpu/embedding/params.h"

namespace rk {

// Samples [b0, b1), kRows or fewer, of F features with one id each: rows of D values side by side, to be x
// [., F D].
struct Lookups {
  static constexpr int64_t kRows = 64;
  const Bags* bags;
  int64_t F, D, b0, b1;
  float* x;
  int64_t stride_x;
};

}  // namespace rk
