// Rows of frozen tables, to float32 and to lanes, for one instruction set.
//
//   value = bias + scale code
//
// D bytes (8 bits) or D / 2 (4 bits) and 8 bytes a row, that is one cache line for D = 16 .. 56 where float32
// has D / 16; D multiply-adds. The latency of the rows is all there is: the caller prefetches.
#pragma once

#include "cpu/serve/params.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace serve {

typedef VectorOf<uint8_t, kFloats>::type u8v;

RK_INLINE f32v widen_codes(u8v codes) {
  return __builtin_convertvector(__builtin_convertvector(codes, i32v), f32v);
}

// Calls put(first value, vector, how many) for values [0, n) of codes, `shift` bits up in their byte.
template <class Put>
RK_INLINE void each_code(const uint8_t* codes, int64_t n, int shift, int mask, float scale, float bias,
                         const Put& put) {
  const u8v low = u8v{} + static_cast<uint8_t>(mask);
  for (int64_t d = 0; d < n; d += kFloats) {
    const int64_t left = n - d < kFloats ? n - d : kFloats;
    u8v v{};
    if (left == kFloats)
      v = load_vector<u8v>(codes + d);
    else
      for (int64_t i = 0; i < left; ++i) v[i] = codes[d + i];
    put(d, widen_codes((v >> shift) & low) * scale + bias, left);
  }
}

template <class T, class Put>
RK_INLINE void each_stored(const T* row, int64_t n, const Put& put) {
  const Tail<T> tail(static_cast<int>(n % kFloats));
  int64_t d = 0;
  for (; d + kFloats <= n; d += kFloats) put(d, Traits<T>::load(row + d), kFloats);
  if (d < n) put(d, tail.load(row + d), n - d);
}

// Calls put(first value, vector, how many) for a row's values.
template <int kBits, class Put>
RK_INLINE void each_value(const char* row, int64_t D, const Put& put) {
  if constexpr (kBits == 32) {
    each_stored(reinterpret_cast<const float*>(row), D, put);
  } else if constexpr (kBits == 16) {
    each_stored(reinterpret_cast<const bf16*>(row), D, put);
  } else {
    float scale, bias;
    __builtin_memcpy(&scale, row, sizeof scale);
    __builtin_memcpy(&bias, row + sizeof scale, sizeof bias);
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(row + 2 * sizeof scale);
    if constexpr (kBits == 8) return each_code(codes, D, 0, 255, scale, bias, put);
    const int64_t half = (D + 1) / 2;
    each_code(codes, half, 0, 15, scale, bias, put);
    each_code(codes, D - half, 4, 15, scale, bias,
              [&](int64_t d, f32v v, int64_t n) __attribute__((always_inline)) { put(half + d, v, n); });
  }
}

template <int kBits>
static void copy_rows(FrozenRows a) {
  for (int64_t i = 0; i < a.n; ++i) {
    float* out = a.out + i * a.ld;
    const bool add = a.add;
    each_value<kBits>(a.table.data + a.rows[i] * a.table.row_bytes, a.table.D,
                      [&](int64_t d, f32v v, int64_t n) __attribute__((always_inline)) {
                        if (n == kFloats) {
                          store_vector(out + d, add ? v + load_vector<f32v>(out + d) : v);
                          return;
                        }
                        for (int64_t j = 0; j < n; ++j) out[d + j] = add ? out[d + j] + v[j] : v[j];
                      });
  }
}

// Lane j of x[i] <-> lane i of x[j], in steps that swap blocks of `half`.
template <int half, bool kSecond, int... j>
RK_INLINE f32v swapped(f32v a, f32v b, Lanes<j...>) {
  constexpr int n = sizeof...(j);
  if constexpr (kSecond) return __builtin_shufflevector(a, b, (j & half ? n + j : j | half)...);
  return __builtin_shufflevector(a, b, (j & half ? n + (j ^ half) : j)...);
}
template <int half>
RK_INLINE void transpose(f32v* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i)
    if (!(i & half)) {
      const f32v a = x[i], b = x[i | half];
      x[i] = swapped<half, false>(a, b, lanes_of(a));
      x[i | half] = swapped<half, true>(a, b, lanes_of(a));
    }
  if constexpr (half > 1) transpose<half / 2>(x);
}

}  // namespace serve

void frozen_rows(FrozenRows a) {
  if (a.table.bits == 32) return serve::copy_rows<32>(a);
  if (a.table.bits == 16) return serve::copy_rows<16>(a);
  if (a.table.bits == 8) return serve::copy_rows<8>(a);
  serve::copy_rows<4>(a);
}

void rank_columns(RankColumns a) {
  constexpr int64_t kTile = kRankVecs * kFloats;
  for (int64_t v = 0; v < a.lanes; v += kFloats)
    for (int64_t d = 0; d < a.D; d += kFloats) {
      f32v x[kFloats];
#pragma GCC unroll 16
      for (int i = 0; i < kFloats; ++i) x[i] = load_vector<f32v>(a.rows + (v + i) * a.ld + d);
      serve::transpose<kFloats / 2>(x);
      float* to = a.columns + d * kTile + v;
      if (a.D - d >= kFloats)
#pragma GCC unroll 16
        for (int i = 0; i < kFloats; ++i) store_vector(to + i * kTile, x[i]);
      else
        for (int64_t i = 0; i < a.D - d; ++i) store_vector(to + i * kTile, x[i]);
    }
}

}  // namespace RK_ISA
}  // namespace rk
