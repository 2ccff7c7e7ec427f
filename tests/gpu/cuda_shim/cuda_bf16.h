// Stands in for CUDA's header, so that the shim needs no CUDA toolkit.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "shim.h"

using __nv_bfloat16 = torch::headeronly::BFloat16;
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
