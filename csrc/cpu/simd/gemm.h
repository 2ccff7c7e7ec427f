// Matrix product, for one instruction set: small operands that stay in the caches.
//
//   C[m, n] = init[m, n] + sum_k A[m, k] B[k, n],   m < M, k < K, n < vecs * lanes
//
// A tile of C of kRows x up to three vectors stays in registers over k: with AVX-512 24 multiply-adds a step
// against 3 vector loads of B and 8 broadcast loads of A, so both multipliers are busy. Each element of C is
// summed over k in order, wherever the tiles fall, so its bits do not depend on M; init comes last, so that
// long sums are sums of partial sums.
//
// 36 columns are two vectors and a quarter, and a third of the work on three vectors would be on padding.
// Where the last `tail` columns fill at most half a vector (see PackedTail), a vector holds them of several k
// side by side, each times its own A[m, k]; its parts are added at the end. Nine multiply-adds instead of
// twelve for 36 columns, five instead of six for 40. A then has stride_k 1, and finite values up to the next
// multiple of four.
#pragma once

#include "cpu/simd/lanes.h"
#include "cpu/simd/operand.h"
#include "cpu/simd/vec.h"
#include "cpu/tuning.h"

namespace rk {
namespace RK_ISA {

template <class A>
struct Operand {
  const A* p;
  int64_t stride_m, stride_k;
};

// What a step of k does with an element of A, broadcast, and a vector of B, which may be stored as another
// type.
template <class A, class S = A>
struct MultiplyAdd {
  using Stored = S;
  using V = typename Traits<A>::vec;
  static RK_INLINE V broadcast(const A* p) { return splat<A>(*p); }
  static RK_INLINE V add(V sum, V a, V b) { return sum + a * b; }
};

// How many of n columns are a tail that this instruction set packs, or 0.
template <class A>
RK_INLINE int64_t tail_width(int64_t n) {
  constexpr int lanes = Traits<A>::lanes;
  const PackedTail tail(n);
  return kFloats >= 8 && sizeof(A) == 4 && tail.first % lanes == 0 && tail.width < lanes ? tail.width : 0;
}

// Calls body with the width as a type, if there is one.
template <class A, class Body>
RK_INLINE void with_tail(int64_t width, const Body& body) {
  if constexpr (kFloats >= 8 && sizeof(A) == 4)
    if (width == 4) body(Int<4>());
  if constexpr (kFloats >= 16 && sizeof(A) == 4)
    if (width == 8) body(Int<8>());
}

// Rows of the largest tile.
constexpr int kGemmTileRows = RK_VECTOR_BYTES == 64 ? 8 : 4;

template <class A, int kRows, int kVecs, int kTail, class Step = MultiplyAdd<A>>
RK_INLINE void gemm_tile(int64_t K, Operand<A> a, const typename Step::Stored* b, int64_t ldb,
                         const typename Step::Stored* tail, A* c, int64_t ldc, const A* init, int64_t ldi) {
  using X = Traits<A>;
  using B = Traits<typename Step::Stored>;
  using V = typename X::vec;
  constexpr int kRowsPerVector = kTail ? X::lanes / kTail : 1;
  V acc[kRows][kVecs + (kTail > 0)] = {};
  const A* a4 = a.p + 4 * a.stride_m;  // so that the eight rows need four address registers
  const auto row = [&](int i)
                       __attribute__((always_inline)) { return (i < 4 ? a.p : a4) + i % 4 * a.stride_m; };
  const auto step = [&](int j) __attribute__((always_inline)) {
    V bv[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) bv[v] = B::load(b + v * X::lanes);
    b += ldb;
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V av = Step::broadcast(row(i) + j);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Step::add(acc[i][v], av, bv[v]);
    }
  };
  if constexpr (kTail > 0) {
    const auto tail_step = [&]() __attribute__((always_inline)) {
      const V bv = B::load(tail);
      tail += X::lanes;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        acc[i][kVecs] = Step::add(acc[i][kVecs], spread(row(i), Int<kTail>()), bv);
    };
    for (; K >= kRowsPerVector; K -= kRowsPerVector, a.p += kRowsPerVector, a4 += kRowsPerVector) {
#pragma GCC unroll 4
      for (int j = 0; j < kRowsPerVector; ++j) step(j);
      tail_step();
    }
    if (K > 0) tail_step();
  }
  for (; K > 0; --K, a.p += a.stride_k, a4 += a.stride_k) step(0);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs + (kTail > 0); ++v) {
      if constexpr (kTail > 0)
        if (v == kVecs) acc[i][v] = sum_parts(acc[i][v], Int<kTail>());
      if (init) acc[i][v] += X::load(init + i * ldi + v * X::lanes);
      X::store(c + i * ldc + v * X::lanes, acc[i][v]);
    }
}

// The tiles are inlined here: as calls, each would pass eleven arguments, through memory.
template <class A, class Step, int kVecs, int kTail>
static __attribute__((noinline)) void gemm_panel(int64_t M, int64_t K, Operand<A> a,
                                                 const typename Step::Stored* b, int64_t ldb,
                                                 const typename Step::Stored* tail, A* c, int64_t ldc,
                                                 const A* init, int64_t ldi) {
  const auto step = [&](auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    gemm_tile<A, kRows, kVecs, kTail, Step>(K, a, b, ldb, tail, c, ldc, init, ldi);
    M -= kRows;
    a.p += kRows * a.stride_m;
    c += kRows * ldc;
    if (init) init += kRows * ldi;
  };
  while (M >= kGemmTileRows) step(Int<kGemmTileRows>());
  if (M >= 4) step(Int<4>());
  if (M >= 2) step(Int<2>());
  if (M >= 1) step(Int<1>());
}

// init may be C itself, a bias (ldi = 0), or null for zero. With tail > 0 the last of the vectors has that
// many columns, which lie packed behind B.
template <class A, class Step = MultiplyAdd<A>>
static void gemm(int64_t M, int64_t vecs, int64_t K, Operand<A> a, const typename Step::Stored* b,
                 int64_t ldb, A* c, int64_t ldc, const A* init, int64_t ldi, int64_t tail = 0) {
  constexpr int64_t lanes = Traits<A>::lanes;
  for (int64_t k = 0; k == 0 || k < K; k += kGemmDepth) {
    const int64_t left = K - k < kGemmDepth ? K - k : kGemmDepth;
    const Operand<A> ak{a.p + k * a.stride_k, a.stride_m, a.stride_k};
    const typename Step::Stored *bk = b + k * ldb, *tail_k = b + K * ldb + k * tail;
    const auto panel = [&](int64_t v, auto whole, auto width) __attribute__((always_inline)) {
      const int64_t n = v * lanes;
      gemm_panel<A, Step, decltype(whole)::value, decltype(width)::value>(
          M, left, ak, bk + n, ldb, tail_k, c + n, ldc, init ? init + n : nullptr, ldi);
    };
    int64_t v = 0;
    const int64_t whole = vecs - (tail > 0), together = tail > 0 ? 2 : 3;  // vectors of the last panel
    while (whole - v > together) {
      const int64_t rest = whole - v;
      if (rest == together + 1) {
        panel(v, Int<2>(), Int<0>());
        v += 2;
      } else {
        panel(v, Int<3>(), Int<0>());
        v += 3;
      }
    }
    const auto last = [&](auto width) __attribute__((always_inline)) {
      if (whole - v == 0) panel(v, Int<0>(), width);
      if (whole - v == 1) panel(v, Int<1>(), width);
      if (whole - v == 2) panel(v, Int<2>(), width);
    };
    if (tail > 0)
      with_tail<A>(tail, last);
    else if (whole - v == 3)
      panel(v, Int<3>(), Int<0>());
    else if (whole > v)
      last(Int<0>());
    init = c;
    ldi = ldc;
  }
}

}  // namespace RK_ISA
}  // namespace rk
