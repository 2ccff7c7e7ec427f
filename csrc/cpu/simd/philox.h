// Random words as a function of a counter and a key, a counter a lane, for one instruction set.
#pragma once

#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// The halves of the products of 32-bit lanes with a constant.
RK_INLINE void multiply(u32v a, uint32_t factor, u32v& high, u32v& low) {
#if RK_VECTOR_BYTES == 64
  const __m512i f = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_mul_epu32((__m512i)a, f),
                odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), f);
  high = (u32v)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low = (u32v)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
#elif RK_VECTOR_BYTES == 32
  const __m256i f = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_mul_epu32((__m256i)a, f),
                odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), f);
  high = (u32v)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (u32v)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kFloats; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * factor;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011): ten rounds on a counter, in place.
RK_INLINE void philox(u32v (&c)[4], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    u32v high0, low0, high2, low2;
    multiply(c[0], 0xd2511f53u, high0, low0);
    multiply(c[2], 0xcd9e8d57u, high2, low2);
    c[0] = high2 ^ c[1] ^ k0;
    c[1] = low2;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
  }
}

}  // namespace RK_ISA
}  // namespace rk
