// The rows of a sample as DIN attention's GEMMs read them, and their gradients, for one instruction set.
#pragma once

#include "cpu/din_attention/params.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace din {

// Which sample of the batch b is, and its history.
template <class T>
RK_INLINE int64_t sample_of(const DinRows<T>& rows, int64_t b) {
  return rows.sample ? rows.sample[b] : b;
}
template <class T>
RK_INLINE int64_t user_of(const DinRows<T>& rows, int64_t b) {
  return rows.user ? rows.user[b] : b;
}

// Whether some rows between others are left out.
template <class T>
RK_INLINE bool has_gaps(const DinRows<T>& rows, int64_t b) {
  return rows.mask && rows.count[b] < rows.first[b + 1] - rows.first[b];
}

// Which rows of the history sample b has: null for the first ones.
template <class T, class A>
static const int32_t* positions(const DinRows<T>& rows, int64_t b, const DinScratch<A>& s) {
  if (!has_gaps(rows, b)) return nullptr;
  const int64_t places = rows.first[b + 1] - rows.first[b];
  if (!s.fresh) return s.positions;
  const uint8_t* mask = rows.mask + rows.place[b];
  int64_t n = 0;
  for (int64_t l = 0; l < places; ++l) {
    s.positions[n] = static_cast<int32_t>(l);
    n += mask[l] != 0;
  }
  return s.positions;
}

// Rows [r0, r0 + n) of sample b, of which w has a value each: those of padding get `value`.
template <class T, class A>
RK_INLINE void set_padding(const DinRows<T>& rows, int64_t b, int64_t r0, int64_t n, A value, A* w) {
  if (!rows.pooled || rows.pooled[b] == rows.count[b]) return;
  const uint8_t* mask = rows.mask ? rows.mask + rows.place[b] : nullptr;
  for (int64_t r = r0; r < r0 + n; ++r)
    if (mask ? !mask[r] : r >= rows.pooled[b]) w[r] = value;
}

// Where the history of sample b begins.
template <class T>
RK_INLINE const T* history_of(const DinRows<T>& rows, int64_t b) {
  return rows.history + (rows.jagged ? rows.place[b] * rows.stride_hl : user_of(rows, b) * rows.stride_hb);
}

// Calls body(first row, rows) on about equal blocks of a sample's n rows; all but the last are of whole
// tiles.
template <class Body>
RK_INLINE void for_each_block(int64_t n, const Body& body) {
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows;
  for (int64_t i = 1, r0 = 0, r1; i <= blocks; ++i, r0 = r1) {
    r1 = i == blocks ? n : (n * i / blocks + 7) / 8 * 8;
    body(r0, r1 - r0);
  }
}

// n rows of D values, ld apart, that a GEMM can read or write.
template <class A>
struct Block {
  A* p;
  int64_t ld;
};

// Zero-copy path: where storage and accumulator types are equal and rows are contiguous whole vectors, they
// are used in place. Returns the pointer only if T is A.
RK_INLINE float* in_place(float* p, float*) { return p; }
RK_INLINE double* in_place(double* p, double*) { return p; }
template <class T, class A>
RK_INLINE A* in_place(T*, A*) {
  return nullptr;
}

// Rows [r0, r0 + n) of sample b: in place, or converted into s.history, where those of a shared history stay.
template <class T, class A>
static Block<const A> history_rows(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t r0,
                                   int64_t n, int64_t D, const DinScratch<A>& s) {
  const T* base = history_of(rows, b);
  if (!position && rows.stride_hl == D && D % Traits<T>::lanes == 0 && D * sizeof(A) <= kDinInPlaceBytes)
    if (const A* p = in_place(const_cast<T*>(base) + r0 * D, s.history)) return {p, D};
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  const int64_t ld = padded<A>(D);
  A* to = s.history + (rows.user ? r0 * ld : 0);
  for (int64_t r = 0; s.fresh && r < n; ++r)
    widen_row(base + (position ? position[r0 + r] : r0 + r) * rows.stride_hl, to + r * ld, D, tail);
  return {to, ld};
}

// Rows that are prefetched into L2, a part at a time between the GEMMs of the block before. Read only when
// they are needed, a thread waits for them at some 15 GB/s.
struct PrefetchRows {
  const char* p;
  int64_t stride, bytes, rows;

  void fetch(int64_t n) {
    for (; n > 0 && rows > 0; --n, --rows, p += stride)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  }
};

// What the block that begins at row r0 of sample b, or else the next sample's first, will read: the history,
// and z of the layers from `low` on where it was kept.
template <class T, class A>
struct Ahead {
  static constexpr int kMost = 4;  // layers
  PrefetchRows history{}, kept[kMost]{};

  Ahead(const Din<A>& net, const DinRows<T>& rows, int64_t b, int64_t r0, int64_t b1, bool need_history,
        int64_t low) {
    if (r0 == rows.count[b]) ++b, r0 = 0;
    if (b == b1 || has_gaps(rows, b)) return;
    const int64_t left = rows.count[b] - r0, n = left < kBlockRows ? left : kBlockRows;
    const T* base = history_of(rows, b);
    const auto bytes = [](const auto* p) { return reinterpret_cast<const char*>(p); };
    const int64_t size = sizeof(T);
    if (need_history) history = {bytes(base + r0 * rows.stride_hl), rows.stride_hl * size, net.D * size, n};
    for (int64_t i = low; i < net.layers && i < low + kMost; ++i)
      if (net.layer[i].kept) {
        const int64_t width = net.layer[i].out, stride = width * static_cast<int64_t>(sizeof(A));
        kept[i - low] = {bytes(net.layer[i].kept + (rows.first[b] + r0) * width), stride, stride, n};
      }
  }
  void fetch(int64_t n) {
    history.fetch(n);
    for (PrefetchRows& z : kept) z.fetch(n);
  }
};

// Where the gradients of these rows are computed, and their way to grad_history: each block's, or those of a
// shared history once, with the last sample of a segment.
template <class T, class A>
RK_INLINE Block<A> grad_rows(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t r0,
                             int64_t D, const DinScratch<A>& s) {
  if (rows.user) return {s.grad_history + r0 * padded<A>(D), padded<A>(D)};
  if (!position && D % Traits<T>::lanes == 0)
    if (A* p = in_place(rows.grad_history + (rows.place[b] + r0) * D, s.grad_history)) return {p, D};
  return {s.grad_history, padded<A>(D)};
}
template <class T, class A>
static void store_grad_rows(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t r0, int64_t n,
                            int64_t D, Block<const A> grad) {
  const Tail<T> tail(static_cast<int>(D % Traits<T>::lanes));
  for (int64_t r = 0; r < n; ++r)
    narrow_row(grad.p + r * grad.ld,
               rows.grad_history + (rows.place[b] + (position ? position[r0 + r] : r0 + r)) * D, D, tail);
}

// Zeros for the rows of b's history that have no gradient: all but the valid ones. Without any there may be
// no memory.
template <class T>
static void clear_grad_rows(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t D) {
  const int64_t places = rows.first[b + 1] - rows.first[b], kept = position ? 0 : rows.count[b];
  if (const int64_t bytes = (places - kept) * D * sizeof(T))
    __builtin_memset(static_cast<void*>(rows.grad_history + (rows.place[b] + kept) * D), 0, bytes);
}

// After the last sample of a segment its sum's way: to grad_history, or where it is added to others.
template <class T, class A>
static void store_segment(const DinRows<T>& rows, int64_t b, const int32_t* position, int64_t D,
                          const DinScratch<A>& s) {
  const int64_t count = rows.count[b], ld = padded<A>(D);
  if (A* sum = rows.segment_sum[rows.segment[b]]) {
    if (count) __builtin_memcpy(sum, s.grad_history, count * ld * sizeof(A));
    return;
  }
  clear_grad_rows(rows, b, position, D);
  store_grad_rows<T, A>(rows, b, position, 0, count, D, {s.grad_history, ld});
}

}  // namespace din
}  // namespace RK_ISA
}  // namespace rk
