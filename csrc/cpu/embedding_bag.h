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
// and an empty bag is zeros. Gradients (those of the rows are summed in embedding_bag_backward.h):
//
//   sum   grad e_{i_p} += w_p grad_out[b]      grad w_p = <grad_out[b], e_{i_p}>
//   mean  the same over n
//   max   grad e_{i_p, d} += grad_out[b, d] for the first p that attains the maximum or is NaN
//
// Bytes: n D loads in lines scattered over the table, D stores a bag; 2 n D flops. The latency of the loads
// is all there is.
#pragma once

#include "columns.h"
#include "embedding_bag_args.h"
#include "vec.h"

namespace rk {
namespace RK_ISA {
namespace bags {

// Ids between a row's turn and asking for it. Further than covers one row's latency: what counts is how many
// rows are on their way. In a bag each vector asks for its own of that row: a burst for all of a row's lines
// fills the queue of misses, and the loads wait behind it (8 x 1M x 64, 20 ids a bag: 2.5 times as long).
// With huge pages that shape takes 1.47 ms at 40, 1.28 at 64, and with 4 KiB pages the same at both.
constexpr int64_t kAhead = 64;

// Vectors of a block of columns where it is more than four: a row of 256 bytes is gone through once, and its
// lines are on their way together. On one Zen 3 core 8 x 1M x 64, 20 ids a bag, takes 4.3 ms so, 5.1 in two
// blocks.
constexpr int kMostVecs = 8;

// Ids ahead, or 0: the table stays in the second-level cache, and asking for its rows is all cost.
RK_INLINE int64_t ahead(const Bags& f, int64_t item_bytes) {
  constexpr int64_t kCached = 256 << 10;
  return f.R * f.stride_wr * item_bytes <= kCached ? 0 : kAhead;
}

// Calls body(cover, first column, first bag, end) for all columns of rows of bags [b0, b1): at once where one
// cover has them all, else bag by bag. Ends with false where body returns it.
template <class T, class Body>
RK_INLINE bool for_each_cover(int64_t D, int64_t b0, int64_t b1, const Body& body) {
  constexpr int64_t kLanes = Traits<T>::lanes, kMost = kMostVecs * kLanes;
  if (D == 0) return body(NoCover<T>(), 0, b0, b1);
  if (D < kLanes)
    return with_piece_cover<T, kLanes / 2>(
        D, [&](auto cover) __attribute__((always_inline)) { return body(cover, 0, b0, b1); });
  for (int64_t b = b0, end; b < b1; b = end) {
    end = D <= kMost ? b1 : b + 1;
    for (int64_t d = 0; d < D; d += kMost) {
      const int64_t width = D - d < kMost ? D - d : kMost;
      if (!with_vector_cover<T, kMostVecs>(
              width, [&](auto cover) __attribute__((always_inline)) { return body(cover, d, b, end); }))
        return false;
    }
  }
  return true;
}

RK_INLINE void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

template <class T, bool kTail>
RK_INLINE typename Traits<T>::vec load(const T* p, bool last, const Tail<T>& tail) {
  return kTail && last ? tail.load(p) : Traits<T>::load(p);
}
template <class T, bool kTail>
RK_INLINE void store(T* p, typename Traits<T>::vec v, bool last, const Tail<T>& tail) {
  if (kTail && last)
    tail.store(p, v);
  else
    Traits<T>::store(p, v);
}

// The ids of bag b that are not padding.
template <class I>
RK_INLINE int64_t count(const Bags& f, const I* ids, int64_t b) {
  const int64_t p0 = f.begin(b), p1 = f.begin(b + 1);
  if (f.padding_idx < 0) return p1 - p0;
  int64_t n = 0;
  for (int64_t p = p0; p < p1; ++p) n += ids[p] != f.padding_idx;
  return n;
}

}  // namespace bags

// Whether all of ids [p0, p1) are in [0, R).
template <class I>
bool embedding_ids_fit(const Bags& f, const I* ids, int64_t p0, int64_t p1) {
  uint64_t bad = 0;
  for (int64_t p = p0; p < p1; ++p) bad |= static_cast<uint64_t>(ids[p]) >= static_cast<uint64_t>(f.R);
  return !bad;
}

// Bags [b0, b1) of one id each, without factors or padding: rows are copied as they are. Returns whether
// their ids are in the table; at one that is not it ends.
template <class I>
bool embedding_rows(const Bags& f, const I* ids, int64_t item_bytes, int64_t b0, int64_t b1) {
  const int64_t bytes = f.D * item_bytes, stride = f.stride_wr * item_bytes,
                stride_out = f.stride_ob * item_bytes;
  const bool streamed = stride_out == bytes && bytes % kCacheLine == 0 && is_streamed(f.out, f.N * bytes);
  const uint64_t R = f.R;
  const int64_t N = f.N, ahead = bags::ahead(f, item_bytes);
  const bool fit = bags::for_each_cover<uint8_t>(
      bytes, b0, b1, [&](auto cover, int64_t d, int64_t p0, int64_t p1) __attribute__((always_inline)) {
        const uint8_t* weight = static_cast<const uint8_t*>(f.weight) + d;
        uint8_t* out = static_cast<uint8_t*>(f.out) + p0 * stride_out + d;
        for (int64_t p = p0; p < p1; ++p, out += stride_out) {
          if (static_cast<uint64_t>(ids[p]) >= R) return false;
          if (ahead) cover.prefetch(weight + ids[p + ahead < N ? p + ahead : p] * stride);
          const uint8_t* row = weight + ids[p] * stride;
          if (streamed)
#pragma GCC unroll 8
            for (int v = 0; v < cover.vecs; ++v) cover.stream(out, v, cover.load(row, v));
          else
#pragma GCC unroll 8
            for (int v = 0; v < cover.vecs; ++v) cover.store(out, v, cover.load(row, v));
        }
        return true;
      });
  if (streamed) end_of_stream();
  return fit;
}

namespace bags {

enum Pooling { kSums, kWeightedSums, kPeaks };

template <class T, class I, Pooling kPooling>
RK_INLINE bool pool(const Bags& f, const I* ids, int64_t b0, int64_t b1) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  const uint64_t R = f.R;
  const int64_t N = f.N, ahead = bags::ahead(f, sizeof(T)), stride = f.stride_wr, padding_idx = f.padding_idx;
  const T* factors = static_cast<const T*>(f.per_sample_weights);
  return for_each_cover<T>(
      f.D, b0, b1, [&](auto cover, int64_t d, int64_t begin, int64_t end) __attribute__((always_inline)) {
        constexpr int kVecs = decltype(cover)::vecs;
        const T* weight = static_cast<const T*>(f.weight) + d;
        T* out = static_cast<T*>(f.out) + begin * f.stride_ob + d;
        for (int64_t b = begin; b < end; ++b, out += f.stride_ob) {
          V acc[kVecs] = {};
          int64_t n = 0;
          for (int64_t p = f.begin(b), p1 = f.begin(b + 1); p < p1; ++p) {
            const int64_t id = ids[p];
            if (static_cast<uint64_t>(id) >= R) return false;
            if (ahead) cover.prefetch(weight + ids[p + ahead < N ? p + ahead : p] * stride);
            if (id == padding_idx) continue;
            const T* row = weight + id * stride;
            const A factor = kPooling == kWeightedSums ? to_scalar(factors[p]) : A(1);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) {
              const V x = cover.load(row, v);
              if constexpr (kPooling == kSums) acc[v] += x;
              if constexpr (kPooling == kWeightedSums) acc[v] += factor * x;
              if constexpr (kPooling == kPeaks) acc[v] = n == 0 ? x : (x > acc[v]) | (x != x) ? x : acc[v];
            }
            ++n;
          }
          const bool divided = f.mode == kMean && n > 1;
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) cover.store(out, v, divided ? acc[v] / A(n) : acc[v]);
        }
        return true;
      });
}

}  // namespace bags

// Bags [b0, b1) of the other modes, likewise.
template <class T, class I>
bool embedding_bags(const Bags& f, const I* ids, int64_t b0, int64_t b1) {
  return f.mode == kMax         ? bags::pool<T, I, bags::kPeaks>(f, ids, b0, b1)
         : f.per_sample_weights ? bags::pool<T, I, bags::kWeightedSums>(f, ids, b0, b1)
                                : bags::pool<T, I, bags::kSums>(f, ids, b0, b1);
}

// Bags [b0, b1) of mode max in the backward: grad_rows [N, D] gets each lookup's own part of grad_out.
template <class T, class I>
void embedding_max_grad_rows(const Bags& f, const I* ids, T* grad_rows, int64_t b0, int64_t b1) {
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(f.D % kLanes));
  for (int64_t b = b0; b < b1; ++b)
    for (int64_t d = 0; d < f.D; d += kLanes) {
      const bool last = d + kLanes > f.D;
      const auto row = [&](int64_t p) __attribute__((always_inline)) {
        return bags::load<T, true>(static_cast<const T*>(f.weight) + ids[p] * f.stride_wr + d, last, tail);
      };
      V peak = {};
      bool empty = true;
      for (int64_t p = f.begin(b); p < f.begin(b + 1); ++p) {
        if (ids[p] == f.padding_idx) continue;
        const V x = row(p);
        peak = empty ? x : (x > peak) | (x != x) ? x : peak;
        empty = false;
      }
      V grad = bags::load<T, true>(static_cast<const T*>(f.out) + b * f.stride_ob + d, last, tail);
      for (int64_t p = f.begin(b); p < f.begin(b + 1); ++p) {
        if (ids[p] == f.padding_idx) continue;
        const V x = row(p);
        const auto attained = (x == peak) | (x != x);  // beside a NaN no other value is the largest
        bags::store<T, true>(grad_rows + p * f.D + d, attained ? grad : V{}, last, tail);
        grad = attained ? V{} : grad;
      }
    }
}

// Bags [b0, b1): the gradient of the per-sample weights, [N].
template <class T, class I>
void embedding_factor_grad(const Bags& f, const I* ids, T* grad_factors, int64_t b0, int64_t b1) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const Tail<T> tail(static_cast<int>(f.D % kLanes));
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t n = f.mode == kMean ? bags::count(f, ids, b) : 1;
    const T* grad = static_cast<const T*>(f.out) + b * f.stride_ob;
    for (int64_t p = f.begin(b); p < f.begin(b + 1); ++p) {
      const T* row = static_cast<const T*>(f.weight) + ids[p] * f.stride_wr;
      V product = {};
      if (ids[p] != f.padding_idx)
        for (int64_t d = 0; d < f.D; d += kLanes) {
          const bool last = d + kLanes > f.D;
          product += bags::load<T, true>(grad + d, last, tail) * bags::load<T, true>(row + d, last, tail);
        }
      const A dot = sum_lanes<T>(product);
      assign(grad_factors[p], n > 1 ? dot / A(n) : dot);
    }
  }
}

#define RK_INSTANTIATE_IDS(I)                                                  \
  template bool embedding_ids_fit<I>(const Bags&, const I*, int64_t, int64_t); \
  template bool embedding_rows<I>(const Bags&, const I*, int64_t, int64_t, int64_t);
#define RK_INSTANTIATE(T, I)                                                                \
  template bool embedding_bags<T, I>(const Bags&, const I*, int64_t, int64_t);              \
  template void embedding_max_grad_rows<T, I>(const Bags&, const I*, T*, int64_t, int64_t); \
  template void embedding_factor_grad<T, I>(const Bags&, const I*, T*, int64_t, int64_t);
#define RK_INSTANTIATE_ALL(T) \
  RK_INSTANTIATE(T, int32_t)  \
  RK_INSTANTIATE(T, int64_t)
RK_INSTANTIATE_IDS(int32_t)
RK_INSTANTIATE_IDS(int64_t)
RK_FOR_EACH_STORAGE(RK_INSTANTIATE_ALL)
#undef RK_INSTANTIATE_ALL
#undef RK_INSTANTIATE
#undef RK_INSTANTIATE_IDS

}  // namespace RK_ISA
}  // namespace rk
