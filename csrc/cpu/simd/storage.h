// How the 16-bit dtypes are stored, for kernels and for the code that calls them. Types alone: see vec.h.
#pragma once

#include <stdint.h>

namespace rk {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace rk

// define(T) for every storage type of a floating-point dtype.
#define RK_FOR_EACH_STORAGE(define) define(float) define(double) define(rk::fp16) define(rk::bf16)
