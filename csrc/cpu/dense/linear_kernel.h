// A linear layer with one unit and no bias, for one instruction set: a product with a vector, bound by
// reading x.
#pragma once

#include "cpu/dense/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

template <class T>
void linear(Linear<T> a, Range rows) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  constexpr int kChains = 4;  // hide the add's latency
  const int64_t n = a.n;
  const T* weight = a.weight;
  const Tail<T> tail(static_cast<int>(n % kLanes));
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const T* row = a.x + b * a.stride_row;
    V sum[kChains] = {};
    int64_t d = 0;
    for (; d + kChains * kLanes <= n; d += kChains * kLanes)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
        sum[c] += Traits<T>::load(row + d + c * kLanes) * Traits<T>::load(weight + d + c * kLanes);
    for (; d + kLanes <= n; d += kLanes) sum[0] += Traits<T>::load(row + d) * Traits<T>::load(weight + d);
    if (d < n) sum[1] += tail.load(row + d) * tail.load(weight + d);
    assign(a.out[b], sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

#define RK_INSTANTIATE(T) template void linear<T>(Linear<T>, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
