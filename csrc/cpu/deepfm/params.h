// What the kernel of look_up_block_kernel.h is given.
#pragma once

#include "cpu/embedding/params.h"
#include "cpu/simd/kernel.h"

namespace rk {

// Samples of F features with one id each: their rows of D values side by side become rows of x [., F D].
struct BlockLookups {
  const Bags* bags;
  int64_t F, D;
  float* x;
  int64_t stride_x;
};
RK_KERNEL(template <class T> void look_up_block(BlockLookups, Range samples))

}  // namespace rk
