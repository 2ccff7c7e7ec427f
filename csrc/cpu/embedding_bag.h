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
constexpr int kWide = RK_VECTOR_BYTES == 32 ? 8 : 0;

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

// Bags [p0, p1) of one id each, without factors or padding: rows are copied as they are.
template <class I>
void embedding_rows(const Bags& f, const I* ids, int64_t item_bytes, int64_t p0, int64_t p1) {
  const char* weight = static_cast<const char*>(f.weight);
  char* out = static_cast<char*>(f.out) + p0 * f.stride_ob * item_bytes;
  const int64_t bytes = f.D * item_bytes, stride = f.stride_wr * item_bytes;
  const bool streamed = f.stride_ob == f.D && bytes % kCacheLine == 0 && is_streamed(f.out, f.N * bytes);
  for (int64_t p = p0; p < p1; ++p, out += f.stride_ob * item_bytes) {
    if (p + bags::kAhead < f.N) bags::prefetch_row(weight + ids[p + bags::kAhead] * stride, bytes);
    const char* row = weight + ids[p] * stride;
    int64_t i = 0;
    if (streamed)
      for (; i < bytes; i += RK_VECTOR_BYTES) stream_vector(out + i, load_vector<f32v>(row + i));
    for (; i + RK_VECTOR_BYTES <= bytes; i += RK_VECTOR_BYTES)
      store_vector(out + i, load_vector<f32v>(row + i));
    for (; i < bytes; i += item_bytes) __builtin_memcpy(out + i, row + i, item_bytes);
  }
  if (streamed) end_of_stream();
}

// Bags [b0, b1) of the other modes.
template <class T, class I>
void embedding_bags(const Bags& f, const I* ids, int64_t b0, int64_t b1) {
  using A = typename Traits<T>::scalar;
  using V = typename Traits<T>::vec;
  constexpr int64_t kLanes = Traits<T>::lanes;
  const T *weight = static_cast<const T*>(f.weight), *factors = static_cast<const T*>(f.per_sample_weights);
  const Tail<T> tail(static_cast<int>(f.D % kLanes));
  constexpr int kVecsOfLine = sizeof(T) * kLanes < 64 ? 64 / (sizeof(T) * kLanes) : 1;  // of a cache line
  const bool plain = f.mode != kMax && !factors && f.padding_idx < 0;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t p0 = f.begin(b), p1 = f.begin(b + 1);
    const int64_t n = f.mode == kMean ? bags::count(f, ids, b) : 1;
    for_each_column_block<T, bags::kWide>(f.D, [&](auto block, int64_t d) __attribute__((always_inline)) {
      constexpr int kVecs = decltype(block)::vecs;
      constexpr bool kTail = decltype(block)::tail;
      V acc[kVecs] = {};
      bool empty = true;
      const auto ask = [&](int64_t p) __attribute__((always_inline)) {
        const T* next = weight + ids[p + bags::kAhead < f.N ? p + bags::kAhead : p] * f.stride_wr + d;
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; v += kVecsOfLine) __builtin_prefetch(next + v * kLanes);
        if (kVecsOfLine > 1) __builtin_prefetch(next + (kTail ? f.D - d : kVecs * kLanes) - 1);
      };
      for (int64_t p = p0; plain && p < p1; ++p) {
        ask(p);
        const T* row = weight + ids[p] * f.stride_wr + d;
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
          acc[v] += bags::load<T, kTail>(row + v * kLanes, v == kVecs - 1, tail);
      }
      for (int64_t p = p0; !plain && p < p1; ++p) {
        ask(p);
        if (ids[p] == f.padding_idx) continue;
        const T* row = weight + ids[p] * f.stride_wr + d;
        if (f.mode != kMax) {
          const A factor = factors ? to_scalar(factors[p]) : A(1);
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v)
            acc[v] += factor * bags::load<T, kTail>(row + v * kLanes, v == kVecs - 1, tail);
        } else {
#pragma GCC unroll 8
          for (int v = 0; v < kVecs; ++v) {
            const V x = bags::load<T, kTail>(row + v * kLanes, v == kVecs - 1, tail);
            acc[v] = empty ? x : (x > acc[v]) | (x != x) ? x : acc[v];
          }
        }
        empty = false;
      }
      T* out = static_cast<T*>(f.out) + b * f.stride_ob + d;
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        bags::store<T, kTail>(out + v * kLanes, n > 1 ? acc[v] / A(n) : acc[v], v == kVecs - 1, tail);
    });
  }
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
  template void embedding_rows<I>(const Bags&, const I*, int64_t, int64_t, int64_t);
#define RK_INSTANTIATE(T, I)                                                                \
  template void embedding_bags<T, I>(const Bags&, const I*, int64_t, int64_t);              \
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
