// Sums of the rows' gradients over sorted lookups, for one instruction set.
//
// The lookups of all tables are sorted by (table, row), ties in their order in the batch; a run is the
// lookups of one row r, and
//
//   grad_weight[r] = sum over its run of factor_i grad_rows[i]
//
// in that order. The sorted lookups are cut into tiles of kTile. A run inside one tile is summed and stored
// there. A run over several tiles leaves one partial sum in each ("carries", two for a tile: of the run that
// came in from the left, and of the one that goes on to the right), and these are added in the tiles' order.
// The tiles do not depend on the number of threads, so neither do the bits; and a row that half of the batch
// looks up is summed by all threads.
//
// Bytes: a gradient row of D values for each lookup, D stores for each row; 2 D flops a lookup.
#pragma once

#include <type_traits>

#include "columns.h"
#include "embedding_bag_args.h"
#include "embedding_bag_update.h"
#include "vec.h"

namespace rk {
namespace RK_ISA {
namespace runs {

// A row and what its gradient is made of are asked for kAhead lookups before their turn, and where the
// gradient lies, kFar lookups before: all are anywhere in memory.
constexpr int64_t kAhead = 16, kFar = 48;

// The rows of the lookup kAhead after lookup p. Every lookup asks, not the first of a run alone: a row that
// starts kAhead after the middle of a run would never be asked for. Each column asks for its own: a burst for
// all of a row's lines fills the queue of misses, and the loads wait behind it.
template <class T>
struct Ahead {
  const T* grad;
  update::Rows<T> rows;

  RK_INLINE Ahead of(const Runs& runs, const TableGrad& table, int64_t p) {
    const int64_t last = runs.n - 1, q = p + kAhead < last ? p + kAhead : last;
    __builtin_prefetch(runs.grad_rows + runs.lookup(p + kFar < last ? p + kFar : last));
    const T* grad = static_cast<const T*>(runs.grad_rows[runs.lookup(q)]);
    // Then the gradient is asked for four times: a branch in ask() took longer (sparse 8 x 1M x 64, one
    // thread: 4.9 and not 4.5 ms).
    if (!table.update) return {grad, {grad, grad, grad, 0, 0}};
    // Perhaps of the next table, and then in vain.
    return {grad, update::Rows<T>::of(*table.update, table.D, int64_t(runs.key(q) - table.first_key))};
  }
  __attribute__((always_inline)) void ask(int64_t d) const {
    __builtin_prefetch(grad + d);
    rows.ask(d);
  }
};

// sum [D] = the lookups [p0, p1), all of one row.
template <class T>
RK_INLINE void sum_run(const Runs& runs, const TableGrad& table, int64_t p0, int64_t p1,
                       typename Traits<T>::scalar* sum) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const int64_t D = table.D;
  const Tail<T> tail(static_cast<int>(D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(D % kLanes));
  for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(block)::vecs;
    constexpr bool kTail = decltype(block)::tail;
    V acc[kVecs] = {};
    for (int64_t p = p0; p < p1; ++p) {
      const uint64_t i = runs.lookup(p);
      const Ahead<T> ahead = Ahead<T>::of(runs, table, p);
      const T* row = static_cast<const T*>(runs.grad_rows[i]) + d;
      const A factor = runs.factors ? A(runs.factors[i]) : A(1);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        ahead.ask(d + v * kLanes);
        acc[v] += factor *
                  (kTail && v == kVecs - 1 ? tail.load(row + v * kLanes) : Traits<T>::load(row + v * kLanes));
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      if (kTail && v == kVecs - 1)
        tail_sum.store(sum + d + v * kLanes, acc[v]);
      else
        Traits<A>::store(sum + d + v * kLanes, acc[v]);
  });
}

RK_INLINE void narrow_row(float*, const float*, int64_t) {}  // was summed in place
RK_INLINE void narrow_row(double*, const double*, int64_t) {}
template <class T>
RK_INLINE void narrow_row(T* row, const float* sum, int64_t D) {
  int64_t d = 0;
  for (; d + kFloats <= D; d += kFloats) Traits<T>::store(row + d, Traits<float>::load(sum + d));
  const int left = static_cast<int>(D - d);
  Tail<T>(left).store(row + d, Tail<float>(left).load(sum + d));
}
RK_INLINE float* place_of(float* row, float*) { return row; }
RK_INLINE double* place_of(double* row, double*) { return row; }
template <class T>
RK_INLINE float* place_of(T*, float* scratch) {
  return scratch;
}

}  // namespace runs

// Writes keys << shift | lookup for the ids [p0, p1) of a feature, or returns false: an id is outside its
// table.
template <class I>
bool embedding_keys(const Bags& f, const I* ids, const LookupKeys& keys, int64_t p0, int64_t p1,
                    uint64_t* keyed) {
  uint64_t bad = 0;
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t id = ids[p];
    bad |= uint64_t(id) >= uint64_t(f.R);
    const bool skip = id == f.padding_idx || id == keys.frozen_row;
    keyed[p] = (skip ? keys.skipped_key : keys.first_key + id) << keys.shift | uint64_t(keys.place + p);
  }
  return !bad;
}

// Sorted lookups [p0, p1): the part of one tile that belongs to one table. carries [2, D]; `distinct` is the
// number of the table's rows before the first run that starts here.
template <class T>
void embedding_reduce(const Runs& runs, const TableGrad& table, int64_t p0, int64_t p1, int64_t distinct,
                      void* carries, void* scratch) {
  using A = typename Traits<T>::scalar;
  A *left = static_cast<A*>(carries), *right = left + table.D, *sum = static_cast<A*>(scratch);
  const update::Step<T> step(table.update, table.D);
  for (int64_t p = p0, q; p < p1; p = q) {
    const uint64_t key = runs.key(p);
    for (q = p + 1; q < p1 && runs.key(q) == key; ++q) {
    }
    if (p > 0 && runs.key(p - 1) == key) {
      runs::sum_run<T>(runs, table, p, q, left);
      continue;
    }
    const int64_t row = static_cast<int64_t>(key - table.first_key), place = table.rows ? distinct++ : row;
    if (table.rows) table.rows[place] = row;
    if (q < runs.n && runs.key(q) == key) {
      runs::sum_run<T>(runs, table, p, q, right);
    } else if (table.update) {
      if (std::is_same_v<T, A> && q == p + 1 && !runs.factors) {  // a row looked up once has its sum already
        const runs::Ahead<T> ahead = runs::Ahead<T>::of(runs, table, p);
        step.take(row, static_cast<const A*>(runs.grad_rows[runs.lookup(p)]),
                  [&](int64_t d) __attribute__((always_inline)) { ahead.ask(d); });
      } else {
        runs::sum_run<T>(runs, table, p, q, sum);
        step.take(row, sum, [](int64_t) __attribute__((always_inline)) {});
      }
    } else {
      T* grad = static_cast<T*>(table.grad_weight) + place * table.D;
      A* wide = runs::place_of(grad, sum);
      runs::sum_run<T>(runs, table, p, q, wide);
      runs::narrow_row(grad, wide, table.D);
    }
  }
}

// The run that starts in a tile and goes on after it, at p1: its carries, the first at `carries` ([2, D], one
// tile's pair), added up. Tiles have `tile` lookups, pairs lie `stride` bytes apart; `distinct` is the number
// of the table's rows before it.
template <class T>
void embedding_join(const Runs& runs, const TableGrad& table, int64_t p1, int64_t tile, int64_t distinct,
                    char* carries, int64_t stride) {
  using A = typename Traits<T>::scalar;
  const uint64_t key = runs.key(p1);
  const int64_t row = static_cast<int64_t>(key - table.first_key);
  A* sum = reinterpret_cast<A*>(carries) + table.D;
  for (int64_t p = p1; p < runs.n && runs.key(p) == key; p += tile) {
    carries += stride;
    const A* left = reinterpret_cast<const A*>(carries);
    for (int64_t d = 0; d < table.D; ++d) sum[d] += left[d];
  }
  if (table.update)
    return update::Step<T>(table.update, table.D).take(row, sum, [](int64_t) __attribute__((always_inline)) {
    });
  T* grad = static_cast<T*>(table.grad_weight) + (table.rows ? distinct : row) * table.D;
  for (int64_t d = 0; d < table.D; ++d) assign(grad[d], sum[d]);
}

#define RK_INSTANTIATE(T)                                                                                    \
  template void embedding_reduce<T>(const Runs&, const TableGrad&, int64_t, int64_t, int64_t, void*, void*); \
  template void embedding_join<T>(const Runs&, const TableGrad&, int64_t, int64_t, int64_t, char*, int64_t);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE
template bool embedding_keys(const Bags&, const int32_t*, const LookupKeys&, int64_t, int64_t, uint64_t*);
template bool embedding_keys(const Bags&, const int64_t*, const LookupKeys&, int64_t, int64_t, uint64_t*);

}  // namespace RK_ISA
}  // namespace rk
