// The matrix product of the DIN attention kernels, for one instruction set: small operands that stay in the
// caches.
//
//   C[m, n] = init[m, n] + sum_k A[m, k] B[k, n],   m < M, k < K, n < vecs * lanes
//
// A tile of C of kRows x up to three vectors stays in registers over k: with AVX-512 24 multiply-adds a step
// against 3 vector loads of B and 8 broadcast loads of A, so both multipliers are busy. Each element of C is
// summed over k in order, wherever the tiles fall, so its bits do not depend on M; init comes last, so that
// long sums are sums of partial sums.
#pragma once

#include "vec.h"

namespace rk {
namespace RK_ISA {

template <class A>
struct Operand {
  const A* p;
  int64_t stride_m, stride_k;
};

template <class A, int kRows, int kVecs>
static __attribute__((noinline)) void gemm_tile(int64_t K, Operand<A> a, const A* b, int64_t ldb, A* c,
                                                int64_t ldc, const A* init, int64_t ldi) {
  using X = Traits<A>;
  typename X::vec acc[kRows][kVecs] = {};
  const A* a4 = a.p + 4 * a.stride_m;  // so that the eight rows need four address registers
  for (int64_t k = 0; k < K; ++k, b += ldb, a.p += a.stride_k, a4 += a.stride_k) {
    typename X::vec bv[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) bv[v] = X::load(b + v * X::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename X::vec av = splat<A>((i < 4 ? a.p : a4)[i % 4 * a.stride_m]);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) acc[i][v] += av * bv[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      if (init) acc[i][v] += X::load(init + i * ldi + v * X::lanes);
      X::store(c + i * ldc + v * X::lanes, acc[i][v]);
    }
}

template <class A, int kVecs>
static inline void gemm_panel(int64_t M, int64_t K, Operand<A> a, const A* b, int64_t ldb, A* c, int64_t ldc,
                              const A* init, int64_t ldi) {
  const auto step = [&](auto rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(rows)::value;
    gemm_tile<A, kRows, kVecs>(K, a, b, ldb, c, ldc, init, ldi);
    M -= kRows;
    a.p += kRows * a.stride_m;
    c += kRows * ldc;
    if (init) init += kRows * ldi;
  };
  constexpr int kMost = RK_VECTOR_BYTES == 64 ? 8 : 4;
  while (M >= kMost) step(Int<kMost>());
  if (M >= 4) step(Int<4>());
  if (M >= 2) step(Int<2>());
  if (M >= 1) step(Int<1>());
}

// init may be C itself, a bias (ldi = 0), or null for zero.
template <class A>
static void gemm(int64_t M, int64_t vecs, int64_t K, Operand<A> a, const A* b, int64_t ldb, A* c, int64_t ldc,
                 const A* init, int64_t ldi) {
  constexpr int64_t lanes = Traits<A>::lanes;
  constexpr int64_t kBlock = 128;  // rows of B: three vectors of them are 24 KiB, half of a first-level cache
  for (int64_t k = 0; k == 0 || k < K; k += kBlock) {
    const int64_t left = K - k < kBlock ? K - k : kBlock;
    const Operand<A> ak{a.p + k * a.stride_k, a.stride_m, a.stride_k};
    const A* bk = b + k * ldb;
    for (int64_t v = 0; v < vecs;) {
      const int64_t n = v * lanes, rest = vecs - v;
      const A* in = init ? init + n : nullptr;
      if (rest == 1) {
        gemm_panel<A, 1>(M, left, ak, bk + n, ldb, c + n, ldc, in, ldi);
        v += 1;
      } else if (rest == 2 || rest == 4) {
        gemm_panel<A, 2>(M, left, ak, bk + n, ldb, c + n, ldc, in, ldi);
        v += 2;
      } else {
        gemm_panel<A, 3>(M, left, ak, bk + n, ldb, c + n, ldc, in, ldi);
        v += 3;
      }
    }
    init = c;
    ldi = ldc;
  }
}

}  // namespace RK_ISA
}  // namespace rk
