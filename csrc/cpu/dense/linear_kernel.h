// A linear layer with one unit and no bias, for one instruction set: a product with a vector, bound by
// reading x.
#pragma once

#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// out[b] = <a, x_b> for samples [b0, b1), of n values each, stride_xb apart.
template <class T>
void linear(const T* x, int64_t stride_xb, const T* a, int64_t n, T* out, int64_t b0, int64_t b1) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  constexpr int kChains = 4;  // hide the add's latency
  const Tail<T> tail(static_cast<int>(n % kLanes));
  for (int64_t b = b0; b < b1; ++b) {
    const T* row = x + b * stride_xb;
    V sum[kChains] = {};
    int64_t d = 0;
    for (; d + kChains * kLanes <= n; d += kChains * kLanes)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
        sum[c] += Traits<T>::load(row + d + c * kLanes) * Traits<T>::load(a + d + c * kLanes);
    for (; d + kLanes <= n; d += kLanes) sum[0] += Traits<T>::load(row + d) * Traits<T>::load(a + d);
    if (d < n) sum[1] += tail.load(row + d) * tail.load(a + d);
    assign(out[b], sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

#define RK_INSTANTIATE(T) template void linear<T>(const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
