// Stands in for HIP's header: see hip_runtime.h.
#pragma once

#include "hip_runtime.h"

struct __half {
  _Float16 value;
};
__device__ inline float __half2float(__half x) { return x.value; }
__device__ inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

// torch's.
__device__ inline short __half_as_short(__half x) { return __builtin_bit_cast(short, x.value); }
__device__ inline __half __hneg(__half x) { return {static_cast<_Float16>(-x.value)}; }
