// How rows of 16-bit tables are rounded, for one instruction set: by whoever stores them, to the nearest, or
// before that stochastically (reference.py: round_stochastically, rounding_bits).
//
//   x becomes that of its two neighbours in the table's dtype which is farther from zero where x lies more
//   than `bits` 2^-16 of their distance beyond the nearer one, and else the nearer one
//
// The 16 random bits are a function of key, step, row and column: Philox4x32-10 with the counter (column / 8,
// row mod 2^32, row / 2^32, step) has those of eight columns. A vector of counters costs what a vector of
// counters does in dropout_kernel.h, forty products of 32 bits a lane, and serves 8 columns a lane.
#pragma once

#include "cpu/simd/lanes.h"
#include "cpu/simd/philox.h"
#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {
namespace update {

// Larger numbers than the dtype has, infinities and NaN stay: what stores them rounds to the nearest.
RK_INLINE f32v round_stochastically(f32v x, u32v bits, bf16) {
  const u32v rounded = ((u32v)x + (0xffffu - bits)) & 0xffff0000u;
  return ((u32v)x & 0x7fffffffu) < 0x7f7f0000u ? (f32v)rounded : x;
}
// Counts spacings of the dtype, which are 2^-24 below 2^-14. All products are exact.
RK_INLINE f32v round_stochastically(f32v x, u32v bits, fp16) {
  const u32v b = (u32v)x & 0x7fffffffu, is_finite = (u32v)(b < 0x477fe000u), exponent = b & 0x7f800000u;
  const u32v spacing = (exponent > (113u << 23) ? exponent : u32v{} + (113u << 23)) - (10u << 23);
  const f32v scaled = (f32v)(b & is_finite) * (f32v)((254u << 23) - spacing);
  const i32v below = __builtin_convertvector(scaled, i32v);
  const f32v beyond = (scaled - __builtin_convertvector(below, f32v)) * 65536.f;
  const i32v up = beyond > __builtin_convertvector((i32v)bits, f32v);  // -1: yes
  const f32v rounded = __builtin_convertvector(below - up, f32v) * (f32v)spacing;
  return is_finite ? (f32v)((u32v)rounded | ((u32v)x & 0x80000000u)) : x;
}

// Lanes of a and b in turn: those of their first halves, or of their second ones.
template <bool second, int... j>
RK_INLINE u32v interleave(u32v a, u32v b, Lanes<j...>) {
  constexpr int n = sizeof...(j);
  return __builtin_shufflevector(a, b, ((j & 1) * n + j / 2 + second * (n / 2))...);
}

// Leaves the rows of a chunk to what stores them.
struct ToNearest {
  RK_INLINE ToNearest(uint64_t, uint32_t, const int64_t*, int64_t, int64_t) {}
  template <class V>
  RK_INLINE V operator()(V w, int64_t, int64_t) const {
    return w;
  }
};

// Rounds the rows of a chunk, in their order and each from its first column to its last.
template <class T>
struct Stochastically {
  static constexpr int kVecs = 2;
  static constexpr int64_t kColumns = 8 * kVecs * kFloats;  // of a draw
  const uint64_t key;
  const uint32_t step;
  const int64_t *rows, *rows_end;
  const int64_t width;            // of a row's bits, those of whole counters and whole vectors
  int64_t begin, end, block = 0;  // the columns drawn, of all rows one after the other, and the next counter
  alignas(64) uint16_t bits[kColumns];

  RK_INLINE Stochastically(uint64_t key, uint32_t step, const int64_t* rows, int64_t n, int64_t D)
      : key(key), step(step), rows(rows), rows_end(rows + n), width(whole(D)), begin(0), end(0) {}

  static RK_INLINE int64_t whole(int64_t D) {
    constexpr int64_t least = kFloats > 8 ? kFloats : 8;
    return (D + least - 1) / least * least;
  }

  // Columns [d, d + kFloats) of row k.
  RK_INLINE f32v operator()(f32v w, int64_t k, int64_t d) {
    const int64_t i = k * width + d;
    if (i >= end) draw(*this);
    return round_stochastically(w, __builtin_convertvector(load_vector<u16v>(bits + (i - begin)), u32v), T());
  }

  // Of several vectors of counters, because ten rounds wait for each other.
  __attribute__((noinline)) static void draw(Stochastically& s) {
    s.begin = s.end, s.end += kColumns;
    uint32_t counters[3][kVecs * kFloats];
    for (int j = 0; j < kVecs * kFloats; ++j) {
      const int64_t row = s.rows < s.rows_end ? *s.rows : 0;
      counters[0][j] = static_cast<uint32_t>(s.block), counters[1][j] = static_cast<uint32_t>(row);
      counters[2][j] = static_cast<uint32_t>(row >> 32);
      if (++s.block * 8 == s.width) s.block = 0, ++s.rows;
    }
    u32v c[kVecs][4];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      for (int word = 0; word < 3; ++word) c[v][word] = load_vector<u32v>(counters[word] + v * kFloats);
      c[v][3] = u32v{} + s.step;
      philox(c[v], s.key);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store_words(s.bits + 8 * v * kFloats, c[v]);
  }

  // The four words of a counter side by side.
  static RK_INLINE void store_words(uint16_t* bits, const u32v (&c)[4]) {
    const auto lanes = lanes_of(f32v());
    const u32v even[2] = {interleave<false>(c[0], c[2], lanes), interleave<true>(c[0], c[2], lanes)},
               odd[2] = {interleave<false>(c[1], c[3], lanes), interleave<true>(c[1], c[3], lanes)};
    for (int half = 0; half < 2; ++half) {
      store_vector(bits + 4 * half * kFloats, interleave<false>(even[half], odd[half], lanes));
      store_vector(bits + (4 * half + 2) * kFloats, interleave<true>(even[half], odd[half], lanes));
    }
  }
};

}  // namespace update
}  // namespace RK_ISA
}  // namespace rk
