// Stands in for HIP's header: see hip_runtime.h.
#pragma once

#include "hip_runtime.h"

struct __hip_bfloat16 {
  __bf16 value;
};
__device__ inline float __bfloat162float(__hip_bfloat16 x) { return x.value; }
__device__ inline __hip_bfloat16 __float2bfloat16(float x) { return {static_cast<__bf16>(x)}; }
