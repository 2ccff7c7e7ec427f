// How the operands of gemm.h lie in memory, for the kernels and for the code that packs them. Neither STL nor
// a function with external linkage: see vec.h.
#pragma once

#include <stdint.h>

#include "cpu/simd/kernel.h"

namespace rk {

// Values of an operand's row: whole cache lines, an odd number of them, so that a column of a wide matrix
// spreads over all sets of the caches.
template <class A>
static inline int64_t padded(int64_t n) {
  constexpr int64_t line = 64 / sizeof(A);
  return ((n + line - 1) / line | 1) * line;
}

// Packed tail of a GEMM operand [K, padded(n)]. The last `width` columns, beyond whole vectors, are stored a
// second time behind the matrix, several rows to a vector, so that the GEMM wastes no lanes on padding
// (gemm.h). For 8 and 16 lanes.
struct PackedTail {
  int64_t first, width;
  explicit PackedTail(int64_t n) : first(n - n % 16), width(0) {
    const int64_t rest = n % 16;
    if (rest > 8) first += 8;
    if (rest > 0 && rest <= 12) width = rest > 4 && rest <= 8 ? 8 : 4;
  }
};
template <class A>
static inline int64_t operand_size(int64_t K, int64_t n) {
  return K * padded<A>(n) + (K + 3) / 4 * 4 * PackedTail(n).width;
}
template <class A>
static inline void copy_tail(A* operand, int64_t K, int64_t n) {
  const PackedTail tail(n);
  A* to = operand + K * padded<A>(n);
  for (int64_t k = 0; k < K; ++k, to += tail.width)
    for (int64_t i = 0; i < tail.width; ++i) to[i] = operand[k * padded<A>(n) + tail.first + i];
}

}  // namespace rk
