// The columns of a row in blocks whose size the compiler knows, for one instruction set.
#pragma once

#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// A block of columns: so many vectors, of which with kTail the last is partial.
template <int kVecs, bool kTail>
struct ColumnBlock {
  static constexpr int vecs = kVecs;
  static constexpr bool tail = kTail;

  // Vector v of the block at p; `partial` has the last columns of the row.
  template <class T>
  static RK_INLINE typename Traits<T>::vec load(const T* p, int v, const Tail<T>& partial) {
    p += v * Traits<T>::lanes;
    return kTail && v == kVecs - 1 ? partial.load(p) : Traits<T>::load(p);
  }
  template <class T>
  static RK_INLINE void store(T* p, int v, typename Traits<T>::vec x, const Tail<T>& partial) {
    p += v * Traits<T>::lanes;
    if (kTail && v == kVecs - 1)
      partial.store(p, x);
    else
      Traits<T>::store(p, x);
  }
};
// Splits a row's D columns into blocks and calls body(ColumnBlock, first column) on each: first blocks of
// kWide vectors (if not zero), then blocks of up to four.
template <class T, int kWide = 0, class Body>
RK_INLINE void for_each_column_block(int64_t D, const Body& body) {
  constexpr int64_t N = Traits<T>::lanes;
  int64_t d = 0;
  if constexpr (kWide > 0)
    for (; d + kWide * N <= D; d += kWide * N) body(ColumnBlock<kWide, false>(), d);
  for (; d + 4 * N <= D; d += 4 * N) body(ColumnBlock<4, false>(), d);
  const int64_t left = D - d;
  if (left == 0) return;
  if (left % N == 0) {
    if (left == N) return body(ColumnBlock<1, false>(), d);
    if (left == 2 * N) return body(ColumnBlock<2, false>(), d);
    return body(ColumnBlock<3, false>(), d);
  }
  if (left < N) return body(ColumnBlock<1, true>(), d);
  if (left < 2 * N) return body(ColumnBlock<2, true>(), d);
  if (left < 3 * N) return body(ColumnBlock<3, true>(), d);
  return body(ColumnBlock<4, true>(), d);
}

// A vector of columns at p: a whole one, or the row's last, which `partial` has.
template <class T>
RK_INLINE typename Traits<T>::vec load_columns(const T* p, bool whole, const Tail<T>& partial) {
  return whole ? Traits<T>::load(p) : partial.load(p);
}
template <class T>
RK_INLINE void store_columns(T* p, typename Traits<T>::vec v, bool whole, const Tail<T>& partial) {
  if (whole)
    Traits<T>::store(p, v);
  else
    partial.store(p, v);
}

// ---- elementwise columns

// Vectors cover a row; the last one ends where the row does and overlaps the one before: what is computed
// twice is the same twice. A row shorter than a vector is covered by two overlapping pieces. Nothing beyond
// the row is touched, nothing masked: a masked store is 40 operations on Zen 3.

// Bytes, copied as they are.
template <>
struct Traits<uint8_t> : Unconverted<uint8_t, f32v, RK_VECTOR_BYTES> {};

// kVecs vectors, the last of which begins at column `last`.
template <class T, int kVecs>
struct VectorCover {
  using V = typename Traits<T>::vec;
  static constexpr int vecs = kVecs;
  int64_t last;

  explicit RK_INLINE VectorCover(int64_t width) : last(width - Traits<T>::lanes) {}
  RK_INLINE int64_t at(int v) const { return v == kVecs - 1 ? last : v * Traits<T>::lanes; }
  RK_INLINE V load(const T* p, int v) const { return Traits<T>::load(p + at(v)); }
  RK_INLINE void store(T* p, int v, V x) const { Traits<T>::store(p + at(v), x); }
  RK_INLINE void store_non_temporal(T* p, int v, V x) const { Traits<T>::store_non_temporal(p + at(v), x); }
  // With `ends` also the line of the last byte.
  RK_INLINE void prefetch(const T* p, bool ends) const {
    constexpr int kBytes = Traits<T>::lanes * sizeof(T), kStep = kBytes < 64 ? 64 / kBytes : 1;
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; v += kStep) __builtin_prefetch(p + v * Traits<T>::lanes);
    if (ends) __builtin_prefetch(p + last + Traits<T>::lanes - 1);
  }
};

// No conversion: stored as it is computed with.
RK_INLINE f32v widen(f32v v, float) { return v; }
RK_INLINE f32v narrow(f32v v, float) { return v; }
RK_INLINE f64v widen(f64v v, double) { return v; }
RK_INLINE f64v narrow(f64v v, double) { return v; }
RK_INLINE f32v widen(f32v v, uint8_t) { return v; }
RK_INLINE f32v narrow(f32v v, uint8_t) { return v; }

// Two pieces of so many bytes, in a vector V whose other bytes are zero.
template <int bytes>
struct Pieces {
  using Piece = typename VectorOf<float, bytes / 4>::type;
  template <class V>
  static RK_INLINE V load(const void* p, const void* q) {
#if RK_VECTOR_BYTES >= 32
    const Piece first = load_vector<Piece>(p), second = load_vector<Piece>(q);
    if constexpr (bytes == 32)
      return (V)__builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    else if constexpr (sizeof(V) == 32)
      return (V)__builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7);
    else
      return (V)__builtin_shufflevector(__builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7),
                                        VectorOf<float, 8>::type{}, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
                                        13, 14, 15);
#endif
  }
  template <class V>
  static RK_INLINE void store(void* p, void* q, V v) {
    const auto x = (typename VectorOf<float, sizeof(V) / 4>::type) v;
    if constexpr (bytes == 32) {
      store_vector(p, __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7));
      store_vector(q, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    } else {
      store_vector(p, __builtin_shufflevector(x, x, 0, 1, 2, 3));
      store_vector(q, __builtin_shufflevector(x, x, 4, 5, 6, 7));
    }
  }
};
template <class Piece>
struct SmallPieces {
  template <class V>
  static RK_INLINE V load(const void* p, const void* q) {
    typedef Piece pieces __attribute__((vector_size(sizeof(V))));
    return (V)pieces{load_vector<Piece>(p), load_vector<Piece>(q)};
  }
  template <class V>
  static RK_INLINE void store(void* p, void* q, V v) {
    typedef Piece pieces __attribute__((vector_size(sizeof(V))));
    store_vector<Piece>(p, ((pieces)v)[0]);
    store_vector<Piece>(q, ((pieces)v)[1]);
  }
};
template <>
struct Pieces<8> : SmallPieces<uint64_t> {};
template <>
struct Pieces<4> : SmallPieces<uint32_t> {};
template <>
struct Pieces<2> : SmallPieces<uint16_t> {};

// Two pieces of kPiece values, the second of which begins at column `last`.
template <class T, int kPiece>
struct PieceCover {
  using V = typename Traits<T>::vec;
  using Stored = decltype(narrow(V(), T()));
  static constexpr int vecs = 1;
  int64_t last;

  explicit RK_INLINE PieceCover(int64_t width) : last(width - kPiece) {}
  RK_INLINE V load(const T* p, int) const {
    return widen(Pieces<kPiece * sizeof(T)>::template load<Stored>(p, p + last), T());
  }
  RK_INLINE void store(T* p, int, V x) const {
    Pieces<kPiece * sizeof(T)>::store(p, p + last, narrow(x, T()));
  }
  RK_INLINE void store_non_temporal(T* p, int, V x) const { store(p, 0, x); }
  RK_INLINE void prefetch(const T* p, bool ends) const {
    __builtin_prefetch(p);
    if (ends) __builtin_prefetch(p + last + kPiece - 1);
  }
};

// No columns at all.
template <class T>
struct NoCover {
  using V = typename Traits<T>::vec;
  static constexpr int vecs = 0;
  RK_INLINE V load(const T*, int) const { return V{}; }
  RK_INLINE void store(T*, int, V) const {}
  RK_INLINE void store_non_temporal(T*, int, V) const {}
  RK_INLINE void prefetch(const T*, bool) const {}
};

// Calls body(cover) of columns [0, width): kLeast to kVecs vectors.
template <class T, int kLeast, int kVecs, class Body>
RK_INLINE auto with_vector_cover(int64_t width, const Body& body) {
  if constexpr (kVecs > kLeast)
    if (width <= (kVecs - 1) * Traits<T>::lanes) return with_vector_cover<T, kLeast, kVecs - 1>(width, body);
  return body(VectorCover<T, kVecs>(width));
}
template <class T, int kPiece, class Body>
RK_INLINE auto with_piece_cover(int64_t width, const Body& body) {
  if constexpr (kPiece > 1 && kPiece * sizeof(T) > 2)
    if (width < kPiece) return with_piece_cover<T, kPiece / 2>(width, body);
  return body(PieceCover<T, kPiece>(width));
}

}  // namespace RK_ISA
}  // namespace rk
