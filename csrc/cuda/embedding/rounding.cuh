// Stochastic rounding of rows of 16-bit tables (reference.py: round_stochastically, rounding_bits), in which
// the lanes of a group agree with each other, with the CPU and with Triton: the 16 random bits of an element
// are a function of key, step, row and column.
//
//   x becomes that of its two neighbours in the table's dtype which is farther from zero where x lies more
//   than `bits` 2^-16 of their distance beyond the nearer one, and else the nearer one
//
// No bytes; some seventy operations for the bits of eight columns, which are a pack, and ten an element.
#pragma once

#include "cuda/common/device.cuh"

namespace rk {
namespace cuda {

template <class To, class From>
__device__ inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011), in place.
__device__ inline void philox(uint32_t (&c)[4], uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  RK_UNROLL
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t a = uint64_t(0xd2511f53u) * c[0], b = uint64_t(0xcd9e8d57u) * c[2];
    c[0] = uint32_t(b >> 32) ^ c[1] ^ k0;
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c[3] ^ k1;
    c[3] = uint32_t(a);
  }
}

// Larger numbers than the dtype has, infinities and NaN stay: what stores them rounds to the nearest.
__device__ inline float round_stochastically(float x, uint32_t bits, bf16) {
  const uint32_t b = bits_as<uint32_t>(x);
  if ((b & 0x7fffffffu) >= 0x7f7f0000u) return x;
  return bits_as<float>((b + (0xffffu - bits)) & 0xffff0000u);
}
// Counts spacings of the dtype, which are 2^-24 below 2^-14. All products are exact.
__device__ inline float round_stochastically(float x, uint32_t bits, fp16) {
  const uint32_t b = bits_as<uint32_t>(x) & 0x7fffffffu, exponent = b & 0x7f800000u;
  if (b >= 0x477fe000u) return x;
  const uint32_t spacing = (exponent > (113u << 23) ? exponent : 113u << 23) - (10u << 23);
  const float scaled = bits_as<float>(b) * bits_as<float>((254u << 23) - spacing);
  const int below = int(scaled);
  const float rounded =
      float(below + ((scaled - float(below)) * 65536.f > float(bits))) * bits_as<float>(spacing);
  return bits_as<uint32_t>(x) >> 31 ? -rounded : rounded;
}

// Columns [d, d + n) of a row, whose pack begins at a multiple of n.
template <class T, int n>
__device__ void round_columns(float (&w)[n], uint64_t key, uint32_t step, int64_t row, int d) {
  static_assert(8 % n == 0, "a pack has one counter");
  uint32_t words[4] = {uint32_t(d) / 8, uint32_t(row), uint32_t(row >> 32), step};
  philox(words, key);
  // Shifted, because an array at a place that only the run knows would lie in memory.
  const uint64_t low = words[0] | uint64_t(words[1]) << 32, high = words[2] | uint64_t(words[3]) << 32;
  RK_UNROLL
  for (int i = 0; i < n; ++i) {
    const int column = (d + i) % 8;
    const uint64_t of_four = column < 4 ? low : high;
    w[i] = round_stochastically(w[i], uint32_t(of_four >> 16 * (column % 4)) & 0xffffu, T());
  }
}

}  // namespace cuda
}  // namespace rk
