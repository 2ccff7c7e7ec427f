// Brings rows of tables under exact Adam up to date, and keeps what it takes: which steps rows are as of, and
// the steps' history. The mathematics is in idle_steps.cuh.
//
// Bytes a row: w, m and v, read and written, and its last step. A group of lanes takes a row.
#pragma once

#include "cuda/embedding/idle_steps.cuh"

namespace rk {
namespace cuda {

// Rows to be brought up to date: those of `n` lookups, or without ids rows 0 to n.
struct IdleRows : CatchUp {
  const void* ids;
  int64_t n;
  int32_t first_block;
  uint8_t log2_lanes;
  bool wide_ids;
};

template <class T, int n>
__device__ void catch_up_row(const CatchUp& table, int64_t row, int32_t last, Group group) {
  using A = accumulate_t<T>;
  const Idle<A> idle(table, last);
  T* const weight = static_cast<T*>(table.weight) + row * table.stride_wr;
  A *const s1 = static_cast<A*>(table.state[0]) + row * table.stride_sr, *const s2 =
                                                                             static_cast<A*>(table.state[1]) +
                                                                             row * table.stride_sr;
  for (int d = group.lane() * n; d < table.D; d += group.lanes() * n) {
    Pack<T, n> w = load<n>(weight + d);
    Pack<A, n> m = load<n>(s1 + d), v = load<n>(s2 + d);
    idle.take(w, m, v);
    store(weight + d, w);
    store(s1 + d, m);
    store(s2 + d, v);
  }
}

// Of the lookups of a row one claims it: the others see it as current, and it will be once the launch is
// done. Ids outside the table are left to the lookup.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) embedding_catch_up(const Batch<IdleRows> batch) {
  const IdleRows& rows = batch.items[find(batch, &IdleRows::first_block, static_cast<int32_t>(blockIdx.x))];
  const Group group{rows.log2_lanes};
  const int64_t p = int64_t(blockIdx.x - rows.first_block) * group.per_block() + group.index();
  if (p >= rows.n) return;
  const int64_t row = rows.ids ? read_int(rows.ids, rows.wide_ids, p) : p;
  if (row < 0 || row >= rows.R) return;
  int32_t last = 0, claimed = 0;
  if (group.lane() == 0) {
    last = rows.last_steps[row];
    claimed = rows.is_idle(last) && atomicCAS(rows.last_steps + row, last, rows.current(last)) == last;
  }
  if (group.sum(claimed) == 0) return;
  last = group.sum(last);
  if (rows.packed)
    catch_up_row<T, kStatePack<T>>(rows, row, last, group);
  else
    catch_up_row<T, 1>(rows, row, last, group);
}

// Lookups whose rows, but those of padding_idx and the frozen row, are as of `step`.
struct SteppedRows {
  int32_t* last_steps;
  const void* ids;
  int64_t R, n, padding_idx, frozen_row;
  int32_t step, first_block;
  bool wide_ids;
};

__global__ void __launch_bounds__(kThreads, kMinBlocks) embedding_mark_steps(const Batch<SteppedRows> batch) {
  const SteppedRows& rows =
      batch.items[find(batch, &SteppedRows::first_block, static_cast<int32_t>(blockIdx.x))];
  const int64_t p = int64_t(blockIdx.x - rows.first_block) * kThreads + threadIdx.x;
  if (p >= rows.n) return;
  const int64_t id = read_int(rows.ids, rows.wide_ids, p);
  if (id >= 0 && id < rows.R && id != rows.padding_idx && id != rows.frozen_row)
    rows.last_steps[id] = rows.step;
}

struct Math {
  __device__ static double sqrt(double x) { return ::sqrt(x); }
  __device__ static double exp(double x) { return ::exp(x); }
  __device__ static double expm1(double x) { return ::expm1(x); }
};

// A thread an entry.
__global__ void __launch_bounds__(kThreads, kMinBlocks) adam_history(const HistoryStep added) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x + 1;
  if (k == 1) added.begin(Math());
  if (k <= added.n) added.add(k, Math());
}

}  // namespace cuda
}  // namespace rk
