// Sums and optimizer steps of rows of D values, a constant, over sorted lookups, for one instruction set.
//
// Variant of segment_sum_kernel.h for rows so wide that two chunks would not fit in L1: applies the optimizer
// as soon as a row's gradient is complete, and prefetches what the lookups kFarWide ahead touch into L2,
// kNearWide ahead into L1. Branches at segment ends; with rows this wide a mispredict is negligible. Bitwise
// equal to the chunked version.
#pragma once

#include "cpu/embedding/optimizer_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace segments {

template <Optimizer kind, int D, class T>
__attribute__((noinline)) void reduce_wide(const SegmentSum& a, Range range) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int kVecs = 4;
  constexpr int64_t kLanes = Traits<T>::lanes, kLine = 64 / sizeof(T), kLineState = 64 / sizeof(A);
  constexpr int kStates = kRules[kind].elementwise;
  constexpr bool kRowWise = update::kRowWise<kind>;
  const Segments lookups = a.segments;
  const TableGrad& table = a.table;
  const Carries carries = a.carries;
  const int64_t tile = a.tile, p0 = range.begin, p1 = range.end;
  const update::Step<T> step(table.update, D);
  const auto to_nearest = [](V w) __attribute__((always_inline)) { return w; };
  const bool scaled = step.grad_factor != 1 || step.max_norm != 0;
  const auto row_of = [&](int64_t p) __attribute__((always_inline)) {
    return static_cast<int64_t>(lookups.key(p < p1 ? p : p1 - 1) - table.first_key);
  };
  const auto prefetch = [&](auto level, int64_t row) __attribute__((always_inline)) {
    constexpr int kLevel = decltype(level)::value;
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; d += kLine)
      __builtin_prefetch(step.weight + row * step.stride_wr + d, 1, kLevel);
    if (kStates >= 1)
#pragma GCC unroll 16
      for (int64_t d = 0; d < D; d += kLineState)
        __builtin_prefetch(step.state1 + row * step.stride_sr + d, 1, kLevel);
    if (kStates == 2)
#pragma GCC unroll 16
      for (int64_t d = 0; d < D; d += kLineState)
        __builtin_prefetch(step.state2 + row * step.stride_sr + d, 1, kLevel);
    step.template prefetch_row_state<kind, kLevel>(row);
  };
  alignas(64) A whole[D];
  for (int64_t p = p0, end = p0; p < p1; p = end) {
    const uint64_t key = lookups.key(p);
    const bool from_left = p % tile == 0 && p > 0 && lookups.key(p - 1) == key;
    const int64_t tile_end = p - p % tile + tile, most = tile_end < p1 ? tile_end : p1;
    do {
      const int64_t next = end + kNearWide < p1 ? end + kNearWide : p1 - 1;
      const T* grad = static_cast<const T*>(lookups.grad_rows[lookups.grad(next)]);
#pragma GCC unroll 16
      for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(grad + d);
      prefetch(Int<3>(), row_of(next));
      prefetch(Int<2>(), row_of(end + kFarWide));
    } while (++end < most && lookups.key(end) == key);
    const bool goes_on = end == tile_end && end < lookups.n && lookups.key(end) == key;
    const bool complete = !from_left && !goes_on;
    A* sum = from_left ? carries.left<A>(p / tile) : goes_on ? carries.right<A>(p / tile) : whole;
    const int64_t row = row_of(p);
    if (complete) step.template catch_up<kind>(row);
#pragma GCC unroll 4
    for (int64_t d = 0; d < D; d += kVecs * kLanes) {
      V acc[kVecs] = {};
      for (int64_t j = p; j < end; ++j) {
        const uint64_t i = lookups.grad(j);
        const T* grad = static_cast<const T*>(lookups.grad_rows[i]) + d;
        const A factor = lookups.factors ? A(lookups.factors[i]) : A(1);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[v] += factor * Traits<T>::load(grad + v * kLanes);
      }
      if (!kRowWise && complete && !scaled) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          step.template apply_columns<kind>(row, d + v * kLanes, acc[v], {}, true, to_nearest);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) Traits<A>::store(sum + d + v * kLanes, acc[v]);
      }
    }
    if (!complete || (!kRowWise && !scaled)) continue;
    if (scaled)
      update::Step<T>::scale_grads(update::Step<T>(step), sum, 1);  // a copy: step stays in registers
    const auto of_row = step.template step_on_row<kind>(row, sum);
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; d += kLanes)
      step.template apply_columns<kind>(row, d, Traits<A>::load(sum + d), of_row, true, to_nearest);
  }
}

}  // namespace segments
}  // namespace RK_ISA
}  // namespace rk
