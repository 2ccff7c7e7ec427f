// The columns of a row in blocks whose size the compiler knows, for one instruction set.
#pragma once

#include "vec.h"

namespace rk {
namespace RK_ISA {

// A block of columns: so many vectors, of which with kTail the last is partial.
template <int kVecs, bool kTail>
struct ColumnBlock {
  static constexpr int vecs = kVecs;
  static constexpr bool tail = kTail;
};
// Calls body(ColumnBlock, first column) on the D columns of a row, in blocks of up to four vectors, after
// those of kWide vectors if there are such.
template <class T, int kWide = 0, class Body>
RK_INLINE void for_each_column_block(int64_t D, const Body& body) {
  constexpr int64_t N = Traits<T>::lanes;
  int64_t d = 0;
  if constexpr (kWide > 0)
    for (; d + kWide * N <= D; d += kWide * N) body(ColumnBlock<kWide, false>(), d);
  for (; d + 4 * N <= D; d += 4 * N) body(ColumnBlock<4, false>(), d);
  const int64_t left = D - d;
  if (left == 0) return;
  if (left % N == 0) {
    if (left == N) return body(ColumnBlock<1, false>(), d);
    if (left == 2 * N) return body(ColumnBlock<2, false>(), d);
    return body(ColumnBlock<3, false>(), d);
  }
  if (left < N) return body(ColumnBlock<1, true>(), d);
  if (left < 2 * N) return body(ColumnBlock<2, true>(), d);
  if (left < 3 * N) return body(ColumnBlock<3, true>(), d);
  return body(ColumnBlock<4, true>(), d);
}

}  // namespace RK_ISA
}  // namespace rk
