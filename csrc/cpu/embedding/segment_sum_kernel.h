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
// Bytes: a gradient row of D values for each lookup, D stores for each row; 2 D flops a lookup. With the FM's
// and the linear term's part of the gradient (FmPart), which is added lookup by lookup and is never stored,
// the row itself is read too, once a run, and grad_fm_s, which a near cache holds: 8 D flops a lookup.
#pragma once

#include "cpu/embedding/optimizer_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace runs {

// Where the pointer to a gradient lies is asked for kFar lookups before it is read.
constexpr int64_t kFar = 64;

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
  bool continued, goes_on;   // the first run began before, the last one ends after
  int64_t runs = 0;
  int64_t row[kMostLookups];    // of each run
  const T* grad[kMostLookups];  // of each lookup
  A factor[kMostLookups];
  M keep[kMostLookups];              // no bit where a run begins, else all
  const A* grad_fm_s[kMostLookups];  // of each lookup's sample, with an FmPart
  A grad_fm[kMostLookups], grad_linear[kMostLookups];

  // No branch depends on where runs begin, which nothing can foresee.
  template <bool kFm>
  void fill(const Runs& runs_, const TableGrad& table, int64_t p0, int64_t p1) {
    begin = p0, n = p1 - p0;
    uint64_t before = p0 > 0 ? runs_.key(p0 - 1) : ~uint64_t(0);
    continued = runs_.key(p0) == before;
    int64_t k = continued - 1;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t p = p0 + j;
      const uint64_t key = runs_.key(p), i = runs_.grad(p);
      __builtin_prefetch(runs_.grad_rows + runs_.grad(p + kFar < runs_.n ? p + kFar : p));
      const bool same = key == before;
      before = key;
      k += !same;
      row[k] = static_cast<int64_t>(key - table.first_key);
      grad[j] = static_cast<const T*>(runs_.grad_rows[i]);
      keep[j] = -M(same);
      factor[j] = runs_.factors ? A(runs_.factors[i]) : A(1);
      if constexpr (kFm) {
        const int64_t b = static_cast<int64_t>(i) - table.first_grad;
        grad_fm_s[j] = static_cast<const A*>(table.fm->grad_fm_s) + b * table.D;
        grad_fm[j] = to_scalar(static_cast<const T*>(table.fm->grad_fm)[b]);
        grad_linear[j] = to_scalar(static_cast<const T*>(table.fm->grad_linear)[b]);
      }
    }
    runs = k + 1;
    goes_on = p1 < runs_.n && runs_.key(p1) == before;
  }
};

// sums [runs, D] = each run's sum in the chunk, with `partial` added to what sums [0] holds already. Asks for
// the gradients of the next chunk, and for its rows of `weight`, stride_wr apart; with kFm those are the
// table's, and `a` [D] the linear term's weights.
template <bool kFm, class T>
RK_INLINE void sum_runs(const Chunk<T>& chunk, const Chunk<T>& next, int64_t D, bool partial, const T* weight,
                        int64_t stride_wr, const T* a, typename Traits<T>::scalar* sums) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  using M = typename MaskOf<A>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(D % kLanes));
  const Tail<A> tail_sum(static_cast<int>(D % kLanes));
  for_each_column_block<T>(D, [&](auto block, int64_t d) __attribute__((always_inline)) {
    constexpr int kVecs = decltype(block)::vecs;
    constexpr bool kTail = decltype(block)::tail;
    V acc[kVecs] = {};
    if (partial)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        acc[v] = kTail && v == kVecs - 1 ? tail_sum.load(sums + d + v * kLanes)
                                         : Traits<A>::load(sums + d + v * kLanes);
    V a_[kVecs] = {};
    if (kFm)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        a_[v] = kTail && v == kVecs - 1 ? tail.load(a + d + v * kLanes) : Traits<T>::load(a + d + v * kLanes);
    A* sum = sums + d - (chunk.continued ? 0 : D);
    int64_t run = chunk.continued - 1;
    for (int64_t j = 0; j < chunk.n; ++j) {
      const T *row = chunk.grad[j] + d, *asked = next.grad[j < next.n ? j : 0] + d,
              *asked_w = weight + next.row[j < next.runs ? j : 0] * stride_wr + d;
      const A factor = chunk.factor[j];
      const auto keep = chunk.keep[j];
      sum += D & ~int64_t(keep);
      run += 1 + int64_t(keep);
      const T* w = kFm ? weight + chunk.row[run] * stride_wr + d : nullptr;
      const A *grad_fm_s = kFm ? chunk.grad_fm_s[j] + d : nullptr,
              *asked_s = kFm ? next.grad_fm_s[j < next.n ? j : 0] + d : nullptr;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const bool last = kTail && v == kVecs - 1;
        __builtin_prefetch(asked + v * kLanes);
        __builtin_prefetch(asked_w + v * kLanes, 1);
        acc[v] = (V)((M)acc[v] & keep);
        V grad = last ? tail.load(row + v * kLanes) : Traits<T>::load(row + v * kLanes);
        if constexpr (kFm) {
          __builtin_prefetch(asked_s + v * kLanes);
          grad += last ? tail_sum.load(grad_fm_s + v * kLanes) : Traits<A>::load(grad_fm_s + v * kLanes);
          grad -= chunk.grad_fm[j] * (last ? tail.load(w + v * kLanes) : Traits<T>::load(w + v * kLanes));
          grad += chunk.grad_linear[j] * a_[v];
          acc[v] += grad;
        } else {
          acc[v] += factor * grad;
        }
        if (last)
          tail_sum.store(sum + v * kLanes, acc[v]);
        else
          Traits<A>::store(sum + v * kLanes, acc[v]);
      }
    }
    for (int64_t j = chunk.n; j < next.n; ++j)
      for (int v = 0; v < kVecs; ++v) {
        __builtin_prefetch(next.grad[j] + d + v * kLanes);
        if (j < next.runs) __builtin_prefetch(weight + next.row[j] * stride_wr + d + v * kLanes, 1);
      }
  });
}

// row [D] = sum [D].
template <class T, class A>
RK_INLINE void narrow_row(T* row, const A* sum, int64_t D) {
  int64_t d = 0;
  for (; d + Traits<T>::lanes <= D; d += Traits<T>::lanes)
    Traits<T>::store(row + d, Traits<A>::load(sum + d));
  const int left = static_cast<int>(D - d);
  Tail<T>(left).store(row + d, Tail<A>(left).load(sum + d));
}

// embedding_reduce for an optimizer and rows of D values, a constant: each row is stepped on as soon as it is
// summed, and every lookup asks for what the lookups kFarWide and kNearWide places on will touch, for the
// second level of the cache and for the first, which a chunk of wide rows and the next one do not fit in.
// Where a run ends is a branch here; between rows this wide it costs less than that. The bits are those of
// chunks.
//
// Neither distance nor hint is what bounds this: a core has so many misses on their way, and no more. With 3
// and 10 a fused step of Adam on 8 x 1M x 64 takes 22.9 ms on one Zen 3 core, with 4 and 16 24.4, with 12 and
// 48 26.5.
constexpr int64_t kNearWide = 3, kFarWide = 10;
template <Optimizer kind, int D, class T>
__attribute__((noinline)) void reduce_wide(const Runs& runs, const TableGrad& table, int64_t p0, int64_t p1,
                                           int64_t tile, const Carries& carries) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int kVecs = 4;
  constexpr int64_t kLanes = Traits<T>::lanes, kLine = 64 / sizeof(T), kLineState = 64 / sizeof(A);
  constexpr int kStates = kind >= kAdam ? 2 : kind == kAdagrad ? 1 : 0;
  const update::Step<T> step(table.update, D);
  const bool scaled = step.grad_factor != 1 || step.max_norm != 0;
  const auto row_of = [&](int64_t p) __attribute__((always_inline)) {
    return static_cast<int64_t>(runs.key(p < p1 ? p : p1 - 1) - table.first_key);
  };
  const auto ask = [&](auto level, int64_t row) __attribute__((always_inline)) {
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
    if (kind == kRowWiseAdagrad) __builtin_prefetch(step.state1 + row, 1, kLevel);
  };
  alignas(64) A whole[D];
  for (int64_t p = p0, end = p0; p < p1; p = end) {
    const uint64_t key = runs.key(p);
    const bool from_left = p % tile == 0 && p > 0 && runs.key(p - 1) == key;
    const int64_t tile_end = p - p % tile + tile, most = tile_end < p1 ? tile_end : p1;
    do {
      const int64_t next = end + kNearWide < p1 ? end + kNearWide : p1 - 1;
      const T* grad = static_cast<const T*>(runs.grad_rows[runs.grad(next)]);
#pragma GCC unroll 16
      for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(grad + d);
      ask(Int<3>(), row_of(next));
      ask(Int<2>(), row_of(end + kFarWide));
    } while (++end < most && runs.key(end) == key);
    const bool goes_on = end == tile_end && end < runs.n && runs.key(end) == key;
    const bool complete = !from_left && !goes_on;
    A* sum = from_left ? carries.left<A>(p / tile) : goes_on ? carries.right<A>(p / tile) : whole;
    const int64_t row = row_of(p);
#pragma GCC unroll 4
    for (int64_t d = 0; d < D; d += kVecs * kLanes) {
      V acc[kVecs] = {};
      for (int64_t j = p; j < end; ++j) {
        const uint64_t i = runs.grad(j);
        const T* grad = static_cast<const T*>(runs.grad_rows[i]) + d;
        const A factor = runs.factors ? A(runs.factors[i]) : A(1);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) acc[v] += factor * Traits<T>::load(grad + v * kLanes);
      }
      if (kind != kRowWiseAdagrad && complete && !scaled) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          step.template take_columns<kind>(row, d + v * kLanes, acc[v], 0, true);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) Traits<A>::store(sum + d + v * kLanes, acc[v]);
      }
    }
    if (!complete || (kind != kRowWiseAdagrad && !scaled)) continue;
    if (scaled) update::Step<T>::scale_grads(step, sum, 1);
    const A scale =
        kind == kRowWiseAdagrad ? step.lr / (update::root(step.add_to_state(row, sum)) + step.eps) : A(0);
#pragma GCC unroll 16
    for (int64_t d = 0; d < D; d += kLanes)
      step.template take_columns<kind>(row, d, Traits<A>::load(sum + d), scale, true);
  }
}

}  // namespace runs

// Writes keys << shift | number of the gradient for the ids of bags [b0, b1) of a feature, or returns false:
// an id is outside its table.
template <class I>
bool embedding_keys(const Bags& f, const I* ids, const LookupKeys& keys, int64_t b0, int64_t b1,
                    uint64_t* keyed) {
  uint64_t bad = 0;
  // No store can change these.
  const uint64_t R = f.R, first_key = keys.first_key, skipped_key = keys.skipped_key;
  const int64_t padding_idx = f.padding_idx, frozen_row = keys.frozen_row;
  const int shift = keys.shift;
  const auto write = [&, ids](int64_t p0, int64_t p1, uint64_t number, uint64_t step)
                         __attribute__((always_inline)) {
                           for (int64_t p = p0; p < p1; ++p, number += step) {
                             const int64_t id = ids[p];
                             bad |= uint64_t(id) >= R;
                             const bool skip = id == padding_idx || id == frozen_row;
                             keyed[p] = (skip ? skipped_key : first_key + id) << shift | number;
                           }
                         };
  const int64_t p0 = f.begin(b0), p1 = f.begin(b1);
  if (keys.one_each || f.L == 1)
    write(p0, p1, keys.place + p0, 1);
  else
    for (int64_t b = b0; b < b1; ++b) write(f.begin(b), f.begin(b + 1), keys.place + b, 0);
  return !bad;
}

// Sorted lookups [p0, p1) of one table, in whole tiles but where the table begins or ends. `distinct` is the
// number of the table's rows before the first run that starts here; scratch [chunk_of(D), D].
template <bool kFm, class T>
void embedding_reduce_as(const Runs& runs, const TableGrad& table, int64_t p0, int64_t p1, int64_t tile,
                         int64_t distinct, const Carries& carries, void* scratch) {
  using A = typename Traits<T>::scalar;
  const int64_t D = table.D;
  if (!kFm && table.update && (D == 64 || D == 128))  // common, and a loop of known length each
    return update::with_kind(table.update->optimizer, [&](auto kind) __attribute__((always_inline)) {
      constexpr Optimizer kKind = decltype(kind)::value;
      (D == 64 ? runs::reduce_wide<kKind, 64, T> : runs::reduce_wide<kKind, 128, T>)(runs, table, p0, p1,
                                                                                     tile, carries);
    });
  int64_t most = chunk_of(D);
  if (kFm && most > kMostFmLookups) most = kMostFmLookups;
  A* sums = static_cast<A*>(scratch);
  const update::Step<T> step(table.update, D);
  runs::Chunk<T> chunks[2];
  const auto fill = [&](runs::Chunk<T>& chunk, int64_t p) {
    const int64_t tile_end = p - p % tile + tile;
    int64_t end = p + most < tile_end ? p + most : tile_end;
    if (end > p1) end = p1;
    if (p < end)
      chunk.template fill<kFm>(runs, table, p, end);
    else
      chunk.n = chunk.runs = 0;
  };
  // The rows that are written, those of the table or of a dense gradient; sparse ones lie in a row. Or those
  // of the table that are read.
  T* grad = static_cast<T*>(table.grad_weight);
  const T* asked = kFm ? static_cast<const T*>(table.fm->weight) : table.update ? step.weight : grad;
  const int64_t stride_asked = kFm ? table.fm->stride_wr : table.update ? step.stride_wr : table.rows ? 0 : D;
  const T* a = kFm ? static_cast<const T*>(table.fm->linear_weight) : nullptr;
  bool from_left = false;  // the chunk's first run began in an earlier tile
  chunks[1].grad[0] = nullptr, chunks[1].row[0] = 0, chunks[1].grad_fm_s[0] = nullptr;
  fill(chunks[0], p0);
  for (int64_t i = 0; chunks[i].n; i = 1 - i) {
    const runs::Chunk<T>&chunk = chunks[i], &next = chunks[1 - i];
    const int64_t p = chunk.begin, end = p + chunk.n;
    fill(chunks[1 - i], end);
    const bool tile_begins = p % tile == 0, tile_ends = end % tile == 0, goes_on = chunk.goes_on;
    from_left = chunk.continued && (tile_begins || from_left);
    runs::sum_runs<kFm>(chunk, next, D, chunk.continued && !tile_begins, asked, stride_asked, a, sums);
    A *left = carries.left<A>(p / tile), *right = carries.right<A>(p / tile);
    const int64_t last = chunk.runs - 1;
    const bool unfinished = goes_on && !tile_ends;  // the last run goes on in this tile
    if (from_left && !(unfinished && last == 0)) runs::narrow_row(left, sums, D);
    if (goes_on && tile_ends && !(from_left && last == 0)) runs::narrow_row(right, sums + last * D, D);
    const int64_t first = from_left, whole = last + !goes_on;  // runs [first, whole) are complete
    const int64_t place = distinct - chunk.continued;          // of the chunk's first run
    if (table.rows)
      for (int64_t k = chunk.continued; k <= last; ++k) table.rows[place + k] = chunk.row[k];
    distinct += chunk.runs - chunk.continued;
    if (table.update) {
      step.take(chunk.row + first, sums + first * D, whole > first ? whole - first : 0, next.row, next.runs);
    } else {
      for (int64_t k = first; k < whole; ++k)
        runs::narrow_row(grad + (table.rows ? place + k : chunk.row[k]) * D, sums + k * D, D);
    }
    if (unfinished && last > 0) runs::narrow_row(sums, sums + last * D, D);
    from_left = from_left && last == 0;
  }
}

template <class T>
void embedding_reduce(const Runs& runs, const TableGrad& table, int64_t p0, int64_t p1, int64_t tile,
                      int64_t distinct, const Carries& carries, void* scratch) {
  (table.fm ? embedding_reduce_as<true, T> : embedding_reduce_as<false, T>)(runs, table, p0, p1, tile,
                                                                            distinct, carries, scratch);
}

// The run that starts in a tile and goes on after it, at p1: its carries added up. Tiles have `tile` lookups;
// `distinct` is the number of the table's rows before it.
template <class T>
void embedding_join(const Runs& runs, const TableGrad& table, int64_t p1, int64_t tile, int64_t distinct,
                    const Carries& carries) {
  using A = typename Traits<T>::scalar;
  const uint64_t key = runs.key(p1);
  const int64_t row = static_cast<int64_t>(key - table.first_key);
  A* sum = carries.right<A>(p1 / tile - 1);
  for (int64_t p = p1; p < runs.n && runs.key(p) == key; p += tile) {
    const A* left = carries.left<A>(p / tile);
    for (int64_t d = 0; d < table.D; ++d) sum[d] += left[d];
  }
  if (table.update) return update::Step<T>(table.update, table.D).take(&row, sum, 1, nullptr, 0);
  T* grad = static_cast<T*>(table.grad_weight) + (table.rows ? distinct : row) * table.D;
  for (int64_t d = 0; d < table.D; ++d) assign(grad[d], sum[d]);
}

// Zeros to whole cache lines, past the caches.
void zero_lines(char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += sizeof(f32v)) stream_vector(p + i, f32v{});
  end_of_stream();
}

#define RK_INSTANTIATE(T)                                                                              \
  template void embedding_reduce<T>(const Runs&, const TableGrad&, int64_t, int64_t, int64_t, int64_t, \
                                    const Carries&, void*);                                            \
  template void embedding_join<T>(const Runs&, const TableGrad&, int64_t, int64_t, int64_t, const Carries&);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE
template bool embedding_keys(const Bags&, const int32_t*, const LookupKeys&, int64_t, int64_t, uint64_t*);
template bool embedding_keys(const Bags&, const int64_t*, const LookupKeys&, int64_t, int64_t, uint64_t*);

}  // namespace RK_ISA
}  // namespace rk
