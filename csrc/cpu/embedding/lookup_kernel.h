// Embedding lookups, pooled or not, for one instruction set.
//
// A bag is a list of ids i_1 .. i_n with factors w_p (1 without per-sample weights); ids equal to padding_idx
// are not in it. With rows e_i of the table [R, D]
//
//   sum   out[b] = sum_p w_p e_{i_p}
//   mean  out[b] = (sum_p w_p e_{i_p}) / n
//   max   out[b, d] = max_p e_{i_p, d}
//   none  out[p] = e_{i_p}
//
// and an empty bag is zeros.
//
// Bytes: n D loads in lines scattered over the table, D stores a bag; 2 n D flops. The latency of the loads
// is all there is.
#pragma once

#include "cpu/embedding/ids_kernel.h"
#include "cpu/embedding/params.h"
#include "cpu/simd/columns.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace bags {

// Prefetch distance in ids of bags, whose sums take longer than a copy's stores, and of copied rows. Longer
// than one row's latency: what counts is how many misses are in flight; farther, rows are evicted again.
constexpr int64_t kBagsAhead = 16, kRowsAhead = 64;

// Prefetch distance, in bytes, of the output.
constexpr int64_t kOutAhead = 1024;

// Vectors of a row in one pass: its lines are in flight together, and its id is read once. AVX2 has 16
// registers; with 16 sums, none of them spilled, rows of 480 bytes take 0.82 of the time of two passes.
constexpr int kMostVecs = RK_VECTOR_BYTES == 16 ? 8 : RK_VECTOR_BYTES == 32 ? 16 : 12;

// How rows are prefetched: `ahead` ids before their turn, 0 for tables that stay in L2, where it only costs.
// `ends`: a row can end on one line more than its length takes.
struct Prefetch {
  int64_t ahead;
  bool ends;

  RK_INLINE Prefetch(const Bags& f, int64_t item_bytes, int64_t far) {
    constexpr int64_t kL2Table = 384 << 10, kL3Table = 16 << 20, kNear = 16, kL1Rows = 16 << 10;
    const int64_t bytes = f.D * item_bytes, stride = f.stride_wr * item_bytes, table = f.R * stride;
    if (far > kNear && bytes * far > kL1Rows) far /= 2;
    ahead = table <= kL2Table ? 0 : table <= kL3Table ? kNear : far;
    const int64_t places = reinterpret_cast<int64_t>(f.weight) | stride | 64;  // rows begin at multiples of
    const int64_t step = places & -places;                                     // its lowest bit
    ends = 64 - step + bytes > (bytes + 63) / 64 * 64;
  }
};

// Calls body(cover, first column, first bag, end) for all columns of rows of bags [b0, b1): at once where one
// cover has them all, else bag by bag, in covers of one width. Rows shorter than kLeast vectors are another
// call's.
template <class T, int kLeast, int kMost, class Body>
RK_INLINE void for_each_cover(int64_t D, int64_t b0, int64_t b1, const Body& body) {
  constexpr int64_t kLanes = Traits<T>::lanes;
  if (kLeast == 1 && D == 0) return body(NoCover<T>(), 0, b0, b1);
  if (kLeast == 1 && D < kLanes)
    return with_piece_cover<T, kLanes / 2>(
        D, [&](auto cover) __attribute__((always_inline)) { return body(cover, 0, b0, b1); });
  const int64_t vecs = (D + kLanes - 1) / kLanes, covers = (vecs + kMost - 1) / kMost;
  const int64_t width = covers == 1 ? D : (vecs + covers - 1) / covers * kLanes;
  for (int64_t b = b0, end; b < b1; b = end) {
    end = covers == 1 ? b1 : b + 1;
    for (int64_t i = 0; i < covers; ++i) {
      const int64_t d = i * width < D - width ? i * width : D - width;  // the last one ends with the row
      with_vector_cover<T, kLeast, kMost>(
          width, [&](auto cover) __attribute__((always_inline)) { body(cover, d, b, end); });
    }
  }
}

}  // namespace bags

bool embedding_ids_in_range(const Bags& f, Range lookups) {
  return with_ids(f, [&](const auto* ids) __attribute__((always_inline)) {
    uint64_t bad = 0;
    for (int64_t p = lookups.begin; p < lookups.end; ++p)
      bad |= static_cast<uint64_t>(ids[p]) >= static_cast<uint64_t>(f.R);
    return !bad;
  });
}

namespace bags {

// Calls body(part) for parts of these bags, each after its ids were found to be in the table, and ends with
// false where they are not. In the loops themselves the check would cost up to a sixth of their time.
template <class Body>
RK_INLINE bool in_checked_parts(const Bags& f, Range bags, const Body& body) {
  constexpr int64_t kIds = 1024;  // of a part: they stay in L1
  const int64_t step = f.N <= kIds ? f.B : (kIds * f.B + f.N - 1) / f.N;
  for (int64_t b = bags.begin; b < bags.end; b += step) {
    const Range part{b, b + step < bags.end ? b + step : bags.end};
    if (!embedding_ids_in_range(f, {f.begin(part.begin), f.begin(part.end)})) return false;
    body(part);
  }
  return true;
}

template <class I>
__attribute__((noinline)) static void copy_rows(const Bags& f, const I* ids, Range range) {
  const int64_t bytes = f.D * f.item_bytes, stride = f.stride_wr * f.item_bytes,
                stride_out = f.stride_ob * f.item_bytes;
  const bool non_temporal =
      stride_out == bytes && bytes % kCacheLine == 0 && is_non_temporal(f.out, f.N * bytes);
  const int64_t N = f.N;
  const Prefetch prefetch(f, f.item_bytes, kRowsAhead);
  for_each_cover<uint8_t, 1, kMostVecs>(
      bytes, range.begin, range.end,
      [&](auto cover, int64_t d, int64_t p0, int64_t p1) __attribute__((always_inline)) {
        const uint8_t* weight = static_cast<const uint8_t*>(f.weight) + d;
        uint8_t* out = static_cast<uint8_t*>(f.out) + p0 * stride_out + d;
        for (int64_t p = p0; p < p1; ++p, out += stride_out) {
          const int64_t next = p + prefetch.ahead;
          if (prefetch.ahead) cover.prefetch(weight + ids[next < N ? next : p] * stride, prefetch.ends);
          const uint8_t* row = weight + ids[p] * stride;
          if (!non_temporal) cover.prefetch(out + kOutAhead, false);
          if (non_temporal)
#pragma GCC unroll 16
            for (int v = 0; v < cover.vecs; ++v) cover.store_non_temporal(out, v, cover.load(row, v));
          else
#pragma GCC unroll 16
            for (int v = 0; v < cover.vecs; ++v) cover.store(out, v, cover.load(row, v));
        }
      });
  if (non_temporal) fence_non_temporal();
}

enum Pooling { kSums, kWeightedSums, kPeaks };

// Without kPrefetch for tables that stay in L2, without kPadding where every id counts: fewer instructions an
// id, which are all their time.
template <Pooling kPooling, bool kPrefetch, bool kPadding, int kLeast, int kMost, class T, class I>
__attribute__((noinline)) void pool(const Bags& f, const I* ids, Range range) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  const int64_t N = f.N, stride = f.stride_wr * int64_t(sizeof(T)), padding_idx = f.padding_idx;
  const T* factors = static_cast<const T*>(f.per_sample_weights);
  const Prefetch prefetch(f, sizeof(T), kBagsAhead);
  for_each_cover<T, kLeast, kMost>(
      f.D, range.begin, range.end,
      [&](auto cover, int64_t d, int64_t begin, int64_t bags_end) __attribute__((always_inline)) {
        constexpr int kVecs = decltype(cover)::vecs;
        const int64_t ahead = prefetch.ahead;
        const bool ends = prefetch.ends;
        const char* weight = reinterpret_cast<const char*>(static_cast<const T*>(f.weight) + d);
        asm("" : "+r"(weight));  // in one register: else each row's address takes two more additions
        T* out = static_cast<T*>(f.out) + begin * f.stride_ob + d;
        for (int64_t b = begin; b < bags_end; ++b, out += f.stride_ob) {
          V acc[kVecs] = {};
          const int64_t first = f.begin(b), end = f.begin(b + 1);
          int64_t n = end - first;
          bool empty = true;
          for (int64_t p = first; p < end; ++p) {
            const int64_t id = ids[p];
            if (kPrefetch && ahead)
              cover.prefetch(reinterpret_cast<const T*>(weight + ids[p + ahead < N ? p + ahead : p] * stride),
                             ends);
            if (kPadding && id == padding_idx) {
              --n;
              continue;
            }
            const T* row = reinterpret_cast<const T*>(weight + id * stride);
            const A factor = kPooling == kWeightedSums ? to_scalar(factors[p]) : A(1);
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) {
              const V x = cover.load(row, v);
              if constexpr (kPooling == kSums) acc[v] += x;
              if constexpr (kPooling == kWeightedSums) acc[v] += factor * x;
              if constexpr (kPooling == kPeaks) acc[v] = empty ? x : (x > acc[v]) | (x != x) ? x : acc[v];
            }
            empty = false;
          }
          cover.prefetch(out + kOutAhead / int64_t(sizeof(T)), false);
          const bool divided = f.mode == kMean && n > 1;
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) cover.store(out, v, divided ? acc[v] / A(n) : acc[v]);
        }
      });
}

}  // namespace bags

bool embedding_rows(const Bags& f, Range range) {
  return with_ids(f, [&](const auto* ids) {
    return bags::in_checked_parts(f, range, [&](Range part) { bags::copy_rows(f, ids, part); });
  });
}

// Sums of more than eight vectors are a function of their own: in one with all covers the compiler makes each
// of them slower, by up to a fifth.
template <class T>
bool embedding_bags(const Bags& f, Range range) {
  using namespace bags;
  const bool prefetch = Prefetch(f, sizeof(T), kBagsAhead).ahead, padding = f.padding_idx >= 0;
  return with_ids(f, [&](const auto* ids) {
    return in_checked_parts(f, range, [&](Range part) {
      if (f.mode == kMax) return pool<kPeaks, true, true, 1, 8, T>(f, ids, part);
      if (f.per_sample_weights) return pool<kWeightedSums, true, true, 1, 8, T>(f, ids, part);
      if constexpr (kMostVecs > 8 && sizeof(T) < 8)
        if (f.D > 8 * Traits<T>::lanes)
          return pool<kSums, true, true, (kMostVecs + 1) / 2, kMostVecs, T>(f, ids, part);
      if (padding) return pool<kSums, true, true, 1, 8, T>(f, ids, part);
      if (prefetch) return pool<kSums, true, false, 1, 8, T>(f, ids, part);
      return pool<kSums, false, false, 1, 8, T>(f, ids, part);
    });
  });
}

#define RK_INSTANTIATE(T) template bool embedding_bags<T>(const Bags&, Range);
RK_FOR_EACH_STORAGE(RK_INSTANTIATE)
#undef RK_INSTANTIATE

}  // namespace RK_ISA
}  // namespace rk
