// Sums of the rows' gradients over sorted lookups, for one instruction set.
//
// The lookups of all tables are sorted by (table, row), ties in their order in the batch; a segment is the
// lookups of one row r, and
//
//   grad_weight[r] = sum over its segment of factor_i grad_rows[i]
//
// in that order. The sorted lookups are cut into tiles. A segment inside one tile is summed and stored there.
// A segment over several tiles leaves one partial sum in each ("carries", two for a tile: of the segment that
// came in from the left, and of the one that goes on to the right), and these are added in the tiles' order.
// The tiles do not depend on the number of threads, so neither do the bits; and a row that half of the batch
// looks up is summed by all threads.
//
// Bytes: a gradient row of D values for each lookup, D stores for each row; 2 D flops a lookup. With the FM's
// and the linear term's part of the gradient (FmPart), which is added lookup by lookup and is never stored,
// the row itself is read too, once a segment, and grad_fm_s, which L2 holds: 8 D flops a lookup.
#pragma once

#include "cpu/embedding/optimizer_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/embedding/segment_sum_wide_kernel.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace segments {

template <class A>
struct MaskOf {
  using vec = i32v;
  using scalar = int32_t;
};
template <>
struct MaskOf<double> {
  using vec = i64v;
  using scalar = int64_t;
};

// Some of the sorted lookups, all of one tile and table.
template <class T>
struct Chunk {
  using A = typename Traits<T>::scalar;
  using M = typename MaskOf<A>::scalar;
  int64_t begin = 0, n = 0;  // lookups [begin, begin + n)
  bool continued, goes_on;   // the first segment began before, the last one ends after
  int64_t segments = 0;
  int64_t row[kMostLookups];    // of each segment
  const T* grad[kMostLookups];  // of each lookup
  A factor[kMostLookups];
  M keep[kMostLookups];              // no bit where a segment begins, else all
  const A* grad_fm_s[kMostLookups];  // of each lookup's sample, with an FmPart
  A grad_fm[kMostLookups], grad_linear[kMostLookups];

  // Branch-free at segment boundaries, which are unpredictable.
  template <bool kFm>
  void fill(const Segments& lookups, const TableGrad& table, int64_t p0, int64_t p1) {
    begin = p0, n = p1 - p0;
    uint64_t before = p0 > 0 ? lookups.key(p0 - 1) : ~uint64_t(0);
    continued = lookups.key(p0) == before;
    int64_t k = continued - 1;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t p = p0 + j;
      const uint64_t key = lookups.key(p), i = lookups.grad(p);
      __builtin_prefetch(lookups.grad_rows +
                         lookups.grad(p + kPointerAhead < lookups.n ? p + kPointerAhead : p));
      const bool same = key == before;
      before = key;
      k += !same;
      row[k] = static_cast<int64_t>(key - table.first_key);
      grad[j] = static_cast<const T*>(lookups.grad_rows[i]);
      keep[j] = -M(same);
      factor[j] = lookups.factors ? A(lookups.factors[i]) : A(1);
      if constexpr (kFm) {
        const int64_t b = static_cast<int64_t>(i) - table.first_grad;
        grad_fm_s[j] = static_cast<const A*>(table.fm->grad_fm_s) + b * table.D;
        grad_fm[j] = to_scalar(static_cast<const T*>(table.fm->grad_fm)[b]);
        grad_linear[j] = to_scalar(static_cast<const T*>(table.fm->grad_linear)[b]);
      }
    }
    segments = k + 1;
    goes_on = p1 < lookups.n && lookups.key(p1) == before;
  }
};

// sums [segments, D] = each segment's sum in the chunk, with `partial` added to what sums [0] holds already.
// Prefetches the next chunk's gradients and its rows of `weight`, stride_wr apart; with kFm those are the
// table's, and `a` [D] the linear term's weights.
template <bool kFm, class T>
RK_INLINE void sum_segments(const Chunk<T>& chunk, const Chunk<T>& next, int64_t D, bool partial,
                            const T* weight, int64_t stride_wr, const T* a,
                            typename Traits<T>::scalar* sums) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  using M = typename MaskOf<A>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(D % kLanes));
  for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(block)::vecs;
    V acc[kVecs] = {};
    if (partial)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[v] = block.load(sums + d, v, tail_sum);
    V a_[kVecs] = {};
    if (kFm)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) a_[v] = block.load(a + d, v, tail);
    A* sum = sums + d - (chunk.continued ? 0 : D);
    int64_t run = chunk.continued - 1;
    for (int64_t j = 0; j < chunk.n; ++j) {
      const T *row = chunk.grad[j] + d, *next_row = next.grad[j < next.n ? j : 0] + d,
              *next_weight = weight + next.row[j < next.segments ? j : 0] * stride_wr + d;
      const A factor = chunk.factor[j];
      const auto keep = chunk.keep[j];
      sum += D & ~int64_t(keep);
      run += 1 + int64_t(keep);
      const T* w = kFm ? weight + chunk.row[run] * stride_wr + d : nullptr;
      const A *grad_fm_s = kFm ? chunk.grad_fm_s[j] + d : nullptr,
              *next_s = kFm ? next.grad_fm_s[j < next.n ? j : 0] + d : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        __builtin_prefetch(next_row + v * kLanes);
        __builtin_prefetch(next_weight + v * kLanes, 1);
        acc[v] = (V)((M)acc[v] & keep);
        V grad = block.load(row, v, tail);
        if constexpr (kFm) {
          __builtin_prefetch(next_s + v * kLanes);
          grad += block.load(grad_fm_s, v, tail_sum);
          grad -= chunk.grad_fm[j] * block.load(w, v, tail);
          grad += chunk.grad_linear[j] * a_[v];
          acc[v] += grad;
        } else {
          acc[v] += factor * grad;
        }
        block.store(sum, v, acc[v], tail_sum);
      }
    }
    for (int64_t j = chunk.n; j < next.n; ++j)
      for (int v = 0; v < kVecs; ++v) {
        __builtin_prefetch(next.grad[j] + d + v * kLanes);
        if (j < next.segments) __builtin_prefetch(weight + next.row[j] * stride_wr + d + v * kLanes, 1);
      }
  });
}

// row [D] = sum [D].
template <class T, class A>
RK_INLINE void store_sum(T* row, const A* sum, int64_t D) {
  int64_t d = 0;
  for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
    Traits<T>::store(row + d, Traits<A>::load(sum + d));
  const int left = static_cast<int>(D - d);
  Tail<T>(left).store(row + d, Tail<A>(left).load(sum + d));
}

// Applies the optimizer to the complete segments of a chunk, or stores their sums.
template <class T>
RK_INLINE void finish_rows(const TableGrad& table, const update::Step<T>& step, const Chunk<T>& chunk,
                           const Chunk<T>& next, int64_t first, int64_t end, int64_t row_offset,
                           Accumulator<T>* sums) {
  const int64_t D = table.D;
  T* grad = static_cast<T*>(table.grad_weight);
  if (table.update)
    return step.apply(chunk.row + first, sums + first * D, end > first ? end - first : 0, next.row,
                      next.segments);
  for (int64_t k = first; k < end; ++k)
    store_sum(grad + (table.rows ? row_offset + k : chunk.row[k]) * D, sums + k * D, D);
}

template <bool kFm, class T>
static void reduce(const SegmentSum& a, Range range, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const TableGrad& table = a.table;
  const int64_t D = table.D, tile = a.tile;
  // Common, and a loop of known length each. Random bits are drawn for a chunk.
  if (!kFm && table.update && !table.update->rounding && (D == 64 || D == 128))
    return update::with_kind(table.update->optimizer, [&](auto kind) __attribute__((always_inline)) {
      constexpr Optimizer kKind = decltype(kind)::value;
      (D == 64 ? reduce_wide<kKind, 64, T> : reduce_wide<kKind, 128, T>)(a, range);
    });
  int64_t most = chunk_of(D);
  if (kFm && most > kMostFmLookups) most = kMostFmLookups;
  const update::Step<T> step(table.update, D);
  Chunk<T> chunks[2];
  const auto fill = [&](Chunk<T>& chunk, int64_t p) {
    const int64_t tile_end = p - p % tile + tile;
    int64_t end = p + most < tile_end ? p + most : tile_end;
    if (end > range.end) end = range.end;
    if (p < end)
      chunk.template fill<kFm>(a.segments, table, p, end);
    else
      chunk.n = chunk.segments = 0;
  };
  // Base of the rows to prefetch: those that are written, the table's or the dense gradient's (sparse
  // gradients are written one after the other and need none), or with an FmPart the table's, which are read.
  const T* rows = kFm            ? static_cast<const T*>(table.fm->weight)
                  : table.update ? step.weight
                                 : static_cast<T*>(table.grad_weight);
  const int64_t stride = kFm ? table.fm->stride_wr : table.update ? step.stride_wr : table.rows ? 0 : D;
  const T* linear_weight = kFm ? static_cast<const T*>(table.fm->linear_weight) : nullptr;
  bool from_left = false;  // the chunk's first segment began in an earlier tile
  int64_t rows_before = a.rows_before;
  chunks[1].grad[0] = nullptr, chunks[1].row[0] = 0, chunks[1].grad_fm_s[0] = nullptr;
  fill(chunks[0], range.begin);
  for (int64_t i = 0; chunks[i].n; i = 1 - i) {
    const Chunk<T>&chunk = chunks[i], &next = chunks[1 - i];
    const int64_t p = chunk.begin, end = p + chunk.n;
    fill(chunks[1 - i], end);
    const bool tile_begins = p % tile == 0, tile_ends = end % tile == 0, goes_on = chunk.goes_on;
    from_left = chunk.continued && (tile_begins || from_left);
    sum_segments<kFm>(chunk, next, D, chunk.continued && !tile_begins, rows, stride, linear_weight, sums);
    A *left = a.carries.template left<A>(p / tile), *right = a.carries.template right<A>(p / tile);
    const int64_t last = chunk.segments - 1;
    const bool unfinished = goes_on && !tile_ends;  // the last segment goes on in this tile
    if (from_left && !(unfinished && last == 0)) store_sum(left, sums, D);
    if (goes_on && tile_ends && !(from_left && last == 0)) store_sum(right, sums + last * D, D);
    const int64_t row_offset = rows_before - chunk.continued;  // of the chunk's first segment
    if (table.rows)
      for (int64_t k = chunk.continued; k <= last; ++k) table.rows[row_offset + k] = chunk.row[k];
    rows_before += chunk.segments - chunk.continued;
    finish_rows(table, step, chunk, next, from_left, last + !goes_on, row_offset, sums);
    if (unfinished && last > 0) store_sum(sums, sums + last * D, D);
    from_left = from_left && last == 0;
  }
}

}  // namespace segments

template <class T>
void embedding_reduce(const SegmentSum& a, Range lookups, void* scratch) {
  (a.table.fm ? segments::reduce<true, T>
              : segments::reduce<false, T>)(a, lookups, static_cast<Accumulator<T>*>(scratch));
}

template <class T>
void embedding_join(const SegmentSum& a, int64_t end) {
  using A = Accumulator<T>;
  const Segments& lookups = a.segments;
  const TableGrad& table = a.table;
  const uint64_t key = lookups.key(end);
  const int64_t row = static_cast<int64_t>(key - table.first_key);
  A* sum = a.carries.right<A>(end / a.tile - 1);
  for (int64_t p = end; p < lookups.n && lookups.key(p) == key; p += a.tile) {
    const A* left = a.carries.left<A>(p / a.tile);
    for (int64_t d = 0; d < table.D; ++d) sum[d] += left[d];
  }
  if (table.update) return update::Step<T>(table.update, table.D).apply(&row, sum, 1, nullptr, 0);
  T* grad = static_cast<T*>(table.grad_weight) + (table.rows ? a.rows_before : row) * table.D;
  for (int64_t d = 0; d < table.D; ++d) assign(grad[d], sum[d]);
}

void zero_lines(char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += sizeof(f32v)) store_vector_non_temporal(p + i, f32v{});
  fence_non_temporal();
}

#define RK_INSTANTIATE(T)                                             \
  template void embedding_reduce<T>(const SegmentSum&, Range, void*); \
  template void embedding_join<T>(const SegmentSum&, int64_t);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
