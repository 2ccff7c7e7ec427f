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

// A row is asked for kAhead lookups before its turn, and where it lies, kFar lookups before: both are
// anywhere in memory.
constexpr int64_t kAhead = 16, kFar = 48;

// At the turn of lookup p.
template <class T>
RK_INLINE void ask_ahead(const Runs& runs, int64_t p, int64_t D) {
  if (p + kFar >= runs.n) return;
  __builtin_prefetch(runs.grad_rows + runs.lookup(p + kFar));
  const char* next = static_cast<const char*>(runs.grad_rows[runs.lookup(p + kAhead)]);
  for (int64_t byte = 0; byte < D * int64_t(sizeof(T)); byte += 64) __builtin_prefetch(next + byte);
}

// sum [D] = the lookups [p0, p1), all of one row.
template <class T>
RK_INLINE void sum_run(const Runs& runs, int64_t p0, int64_t p1, int64_t D, typename Traits<T>::scalar* sum) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(D % kLanes));
  for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(block)::vecs;
    constexpr bool kTail = decltype(block)::tail;
    V acc[kVecs] = {};
    for (int64_t p = p0; p < p1; ++p) {
      const uint64_t i = runs.lookup(p);
      if (d == 0) ask_ahead<T>(runs, p, D);
      const T* row = static_cast<const T*>(runs.grad_rows[i]) + d;
      const A factor = runs.factors ? A(runs.factors[i]) : A(1);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        acc[v] += factor *
                  (kTail && v == kVecs - 1 ? tail.load(row + v * kLanes) : Traits<T>::load(row + v * kLanes));
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

// Sorted lookups [p0, p1): the part of one tile that belongs to one table. carries [2, D]; `distinct` is the
// number of the table's rows before the first run that starts here.
template <class T>
void embedding_reduce(const Runs& runs, const TableGrad& table, int64_t p0, int64_t p1, int64_t distinct,
                      void* carries, void* scratch) {
  using A = typename Traits<T>::scalar;
  A *left = static_cast<A*>(carries), *right = left + table.D;
  for (int64_t p = p0, q; p < p1; p = q) {
    const uint64_t key = runs.key(p);
    for (q = p + 1; q < p1 && runs.key(q) == key; ++q) {
    }
    // Every lookup asks, not the first of a run alone: a row that starts kAhead after the middle of a run
    // would never be asked for.
    for (int64_t i = p + runs::kAhead, end = q + runs::kAhead; table.update && i < end && i < runs.n; ++i)
      if (runs.key(i) != runs.key(i - 1))  // perhaps of the next table, and then in vain
        update::prefetch<T>(*table.update, table.D, static_cast<int64_t>(runs.key(i) - table.first_key));
    if (p > 0 && runs.key(p - 1) == key) {
      runs::sum_run<T>(runs, p, q, table.D, left);
      continue;
    }
    const int64_t row = static_cast<int64_t>(key - table.first_key), place = table.rows ? distinct++ : row;
    if (table.rows) table.rows[place] = row;
    if (q < runs.n && runs.key(q) == key) {
      runs::sum_run<T>(runs, p, q, table.D, right);
    } else if (table.update) {
      const A* sum = static_cast<const A*>(scratch);
      if (std::is_same_v<T, A> && q == p + 1 && !runs.factors) {  // a row looked up once has its sum already
        runs::ask_ahead<T>(runs, p, table.D);
        sum = static_cast<const A*>(runs.grad_rows[runs.lookup(p)]);
      } else {
        runs::sum_run<T>(runs, p, q, table.D, static_cast<A*>(scratch));
      }
      update::update_row<T>(*table.update, table.D, row, sum);
    } else {
      T* grad = static_cast<T*>(table.grad_weight) + place * table.D;
      A* sum = runs::place_of(grad, static_cast<A*>(scratch));
      runs::sum_run<T>(runs, p, q, table.D, sum);
      runs::narrow_row(grad, sum, table.D);
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
  if (table.update) return update::update_row<T>(*table.update, table.D, row, sum);
  T* grad = static_cast<T*>(table.grad_weight) + (table.rows ? distinct : row) * table.D;
  for (int64_t d = 0; d < table.D; ++d) assign(grad[d], sum[d]);
}

#define RK_INSTANTIATE(T)                                                                                    \
  template void embedding_reduce<T>(const Runs&, const TableGrad&, int64_t, int64_t, int64_t, void*, void*); \
  template void embedding_join<T>(const Runs&, const TableGrad&, int64_t, int64_t, int64_t, char*, int64_t);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
