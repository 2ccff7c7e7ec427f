// Rows of values stored as T, to and from the accumulators they are computed with, for one instruction set.
#pragma once

#include "cpu/simd/accumulator.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// to [n, up to whole vectors] = each(first column, vector) of from [n]; the columns added are zero going in.
template <class T, class Each>
RK_INLINE void widen_row(const T* from, Accumulator<T>* to, int64_t n, const Tail<T>& tail,
                         const Each& each) {
  using X = Traits<Accumulator<T>>;
  int64_t d = 0;
  for (; d + X::lanes <= n; d += X::lanes) X::store(to + d, each(d, Traits<T>::load(from + d)));
  if (d < n) X::store(to + d, each(d, tail.load(from + d)));
}
template <class T>
RK_INLINE void widen_row(const T* from, Accumulator<T>* to, int64_t n, const Tail<T>& tail) {
  widen_row(from, to, n, tail,
            [](int64_t, typename Traits<T>::vec v) __attribute__((always_inline)) { return v; });
}

// to [n] = from [n, up to whole vectors].
template <class T>
RK_INLINE void narrow_row(const Accumulator<T>* from, T* to, int64_t n, const Tail<T>& tail) {
  using X = Traits<Accumulator<T>>;
  int64_t d = 0;
  for (; d + X::lanes <= n; d += X::lanes) Traits<T>::store(to + d, X::load(from + d));
  if (d < n) tail.store(to + d, X::load(from + d));
}

}  // namespace RK_ISA
}  // namespace rk
