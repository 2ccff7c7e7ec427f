// When an output is stored past the caches (store_vector_non_temporal in vec.h). For kernels and for the code
// that calls them: no torch header, nothing the linker could pick for another instruction set.
#pragma once

#include <stdint.h>

#include "cpu/simd/kernel.h"

namespace rk {

// From this size on an output, and as much that was read for it, leave nothing of it in the caches for its
// reader. FM's backward and a pass over its result gain 19 to 37 % from 20 MB on, at 7 MB they lose or gain
// little, at 3 MB they lose 15 % (Zen 3, 32 MiB of third-level cache).
constexpr int64_t kNonTemporalMinBytes = 16 << 20;
constexpr uintptr_t kCacheLine = 64;

static RK_INLINE bool is_non_temporal(const void* out, int64_t bytes) {
  return bytes >= kNonTemporalMinBytes && reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
}

}  // namespace rk
