// Which outputs are stored non-temporally (store_vector_non_temporal in vec.h), for kernels and the code that
// calls them.
#pragma once

#include <stdint.h>

#include "cpu/simd/kernel.h"
#include "cpu/tuning.h"

namespace rk {

static RK_INLINE bool is_non_temporal(const void* out, int64_t bytes) {
  return bytes >= kNonTemporalMinBytes && reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
}

}  // namespace rk
