// Sums over the lanes of vectors and values spread over lanes, for one instruction set.
#pragma once

#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

template <int n>
struct Int {
  static constexpr int value = n;
};
template <int... j>
struct Lanes {};
RK_INLINE auto lanes_of(f32v) {
#if RK_VECTOR_BYTES == 64
  return Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>();
#elif RK_VECTOR_BYTES == 32
  return Lanes<0, 1, 2, 3, 4, 5, 6, 7>();
#else
  return Lanes<0, 1, 2, 3>();
#endif
}
RK_INLINE auto lanes_of(f64v) {
#if RK_VECTOR_BYTES == 64
  return Lanes<0, 1, 2, 3, 4, 5, 6, 7>();
#elif RK_VECTOR_BYTES == 32
  return Lanes<0, 1, 2, 3>();
#else
  return Lanes<0, 1>();
#endif
}

// Lane j of a plus lane j ^ half of it, where j has no bit `half`; the same of b elsewhere.
template <int half, class V, int... j>
RK_INLINE V fold_lanes(V a, V b, Lanes<j...>) {
  constexpr int n = sizeof...(j);
  return __builtin_shufflevector(a, b, (j & half ? n + j : j)...) +
         __builtin_shufflevector(a, b, (j & half ? n + (j ^ half) : j ^ half)...);
}

// The sum of the lanes, in a fixed order (halves, then quarters, ...).
template <class T>
RK_INLINE typename Traits<T>::scalar sum_lanes(typename Traits<T>::vec v) {
  constexpr int n = Traits<T>::lanes;
  if constexpr (n >= 16) v = fold_lanes<8>(v, v, lanes_of(v));
  if constexpr (n >= 8) v = fold_lanes<4>(v, v, lanes_of(v));
  if constexpr (n >= 4) v = fold_lanes<2>(v, v, lanes_of(v));
  return v[0] + v[1];
}

// Lane i < width of the result is the sum of the lanes i, i + width, i + 2 width ...; the other lanes are
// zero.
template <class V, int width>
RK_INLINE V sum_parts(V v, Int<width>) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  if constexpr (n >= 16 && width <= 8) v = fold_lanes<8>(v, v, lanes_of(v));
  if constexpr (n >= 8 && width <= 4) v = fold_lanes<4>(v, v, lanes_of(v));
  V lane;
  for (int i = 0; i < n; ++i) lane[i] = i;
  return lane < width ? v : V{};  // and not a product: infinity times zero is no zero
}

// Each lane of the result is all lanes of v with its remainder by `width`, combined in a fixed order.
template <int half, class V, int... j>
RK_INLINE V flip_lanes(V v, Lanes<j...>) {
  return __builtin_shufflevector(v, v, (j ^ half)...);
}
template <int width, int half, class V, class Combine>
RK_INLINE V combine_parts(V v, const Combine& combine) {
  if constexpr (half < width)
    return v;
  else
    return combine_parts<width, half / 2>(combine(v, flip_lanes<half>(v, lanes_of(v))), combine);
}
template <int width, class V, class Combine>
RK_INLINE V combine_parts(V v, const Combine& combine) {
  return combine_parts<width, static_cast<int>(sizeof(V) / sizeof(v[0]) / 2)>(v, combine);
}

// Lane i of the result is the sum of the lanes of x[i], in the order of sum_lanes; x is overwritten.
template <int half, class V>
RK_INLINE V sum_each_from(V* x) {
#pragma GCC unroll 8
  for (int i = 0; i < half; ++i) x[i] = fold_lanes<half>(x[i], x[i + half], lanes_of(V()));
  if constexpr (half > 1)
    return sum_each_from<half / 2>(x);
  else
    return x[0];
}
template <class V>
RK_INLINE V sum_each(V* x) {
  return sum_each_from<sizeof(V) / sizeof(x[0][0]) / 2>(x);
}

// The halves of a and b by bit `half` of the lane: those without it of both go to a, those with it to b.
template <int half, class V, int... j>
RK_INLINE void swap_lanes(V& a, V& b, Lanes<j...>) {
  constexpr int n = sizeof...(j);
  const V low = __builtin_shufflevector(a, b, (j & half ? n + (j ^ half) : j)...);
  b = __builtin_shufflevector(a, b, (j & half ? n + j : j ^ half)...);
  a = low;
}
// Lane j of x[i] and lane i of x[j] change places, of as many vectors as they have lanes.
template <int half, class V>
RK_INLINE void transpose_from(V* x) {
  constexpr int n = sizeof(V) / sizeof(x[0][0]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if (!(i & half)) swap_lanes<half>(x[i], x[i | half], lanes_of(V()));
  if constexpr (half > 1) transpose_from<half / 2>(x);
}
template <class V>
RK_INLINE void transpose(V* x) {
  transpose_from<sizeof(V) / sizeof(x[0][0]) / 2>(x);
}

// p[0 .. lanes / width - 1], each in `width` neighbouring lanes.
#if RK_VECTOR_BYTES == 64
RK_INLINE f32v spread(const float* p, Int<4>) {
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (f32v)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(p)), each);
}
RK_INLINE f32v spread(const float* p, Int<8>) {
  const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return (f32v)_mm512_permutevar_ps((__m512)_mm512_set1_pd(both), each);
}
#elif RK_VECTOR_BYTES == 32
RK_INLINE f32v spread(const float* p, Int<4>) {
  const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  return (f32v)_mm256_permutevar_ps((__m256)_mm256_set1_pd(both), each);
}
#endif

}  // namespace RK_ISA
}  // namespace rk
