// The lookups of a block of samples for an MLP on them, for one instruction set.
//
// The MLP finds its operands in L2 (dense/hidden_layers_kernel.h), so memory has only the tables' rows to
// give, scattered lines. All rows of a feature are prefetched while those of the feature before are copied,
// so the miss queue is full; between the tiles of the GEMM before they would stall its loads
// (docs/performance/deepfm.md).
#pragma once

#include "cpu/deepfm/params.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// Feature by feature, the rows of the next one on their way.
template <class T>
void look_up_block(BlockLookups a, Range samples) {
  const auto row = [&](const Bags& bag, int64_t b) __attribute__((always_inline)) {
    const int64_t id =
        bag.wide_ids ? static_cast<const int64_t*>(bag.ids)[b] : static_cast<const int32_t*>(bag.ids)[b];
    return static_cast<const T*>(bag.weight) + id * bag.stride_wr;
  };
  const auto prefetch = [&](const Bags& bag) __attribute__((always_inline)) {
    for (int64_t b = samples.begin; b < samples.end; ++b)
      for (int64_t d = 0; d < a.D; d += 64 / sizeof(T)) __builtin_prefetch(row(bag, b) + d);
  };
  prefetch(a.bags[0]);
  for (int64_t f = 0; f < a.F; ++f) {
    if (f + 1 < a.F) prefetch(a.bags[f + 1]);
    for (int64_t b = samples.begin; b < samples.end; ++b) {
      const T* from = row(a.bags[f], b);
      T* to = a.x + (b - samples.begin) * a.stride_x + f * a.D;
      int64_t d = 0;
      for (; d + Traits<T>::lanes <= a.D; d += Traits<T>::lanes)
        Traits<T>::store(to + d, Traits<T>::load(from + d));
      for (; d < a.D; ++d) to[d] = from[d];
    }
  }
}

template void look_up_block<float>(BlockLookups, Range);

}  // namespace RK_ISA
}  // namespace rk
