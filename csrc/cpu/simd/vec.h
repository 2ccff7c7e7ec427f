// Vectors of RK_VECTOR_BYTES on the GCC/Clang vector extensions, for one instruction set (see isa.h).
//
// Traits<T> says how values stored as T are computed with: `vec` holds `lanes` accumulators (float for the
// 16-bit types, T itself otherwise), `load`/`store` convert on the way. Tail handles the last n < lanes
// values of a row without touching memory beyond it.
//
// No STL, no torch header: whatever inline code comes in here is compiled for this instruction set, and the
// linker could pick that copy for the rest of the library.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#  include <immintrin.h>
#endif

#include "cpu/simd/kernel.h"
#include "cpu/simd/non_temporal.h"
#include "cpu/simd/storage.h"

namespace rk {
namespace RK_ISA {

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
  typedef E unaligned __attribute__((vector_size(sizeof(E) * N), aligned(1), may_alias));
};

#if !defined(__clang__) && __GNUC__ < 12
// GCC 11 knows no __builtin_shufflevector: these lanes of a and b joined.
template <class V, class... Lane>
RK_INLINE auto shuffle_lanes(V a, V b, Lane... lane) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  return
      typename VectorOf<__typeof__(a[0]), sizeof...(lane)>::type{(lane < n ? a[lane % n] : b[lane % n])...};
}
#  define __builtin_shufflevector shuffle_lanes
#endif

constexpr int kFloats = RK_VECTOR_BYTES / 4, kDoubles = RK_VECTOR_BYTES / 8;
using f32v = VectorOf<float, kFloats>::type;
using f64v = VectorOf<double, kDoubles>::type;
using u32v = VectorOf<uint32_t, kFloats>::type;
using i32v = VectorOf<int32_t, kFloats>::type;
using i64v = VectorOf<int64_t, kDoubles>::type;
using u16v = VectorOf<uint16_t, kFloats>::type;

template <class V>
RK_INLINE V load_vector(const void* p) {
  typedef V unaligned __attribute__((aligned(1), may_alias));
  return *static_cast<const unaligned*>(p);
}
template <class V>
RK_INLINE void store_vector(void* p, V v) {
  typedef V unaligned __attribute__((aligned(1), may_alias));
  *static_cast<unaligned*>(p) = v;
}

// Non-temporal store, where the processor has one: an ordinary store would first read the line. Whoever reads
// it next has to fetch it from memory, and a line not written at once and as a whole costs more than it
// saves. p is a multiple of V's size.
template <class V>
RK_INLINE void store_vector_non_temporal(void* p, V v) {
#if defined(__x86_64__)
#  if RK_VECTOR_BYTES >= 64
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#  endif
#  if RK_VECTOR_BYTES >= 32
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#  endif
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  store_vector(p, v);
}
// Orders non-temporal stores before what tells another thread of them.
RK_INLINE void fence_non_temporal() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- 16-bit storage

RK_INLINE f32v widen(u16v h, bf16) { return (f32v)(__builtin_convertvector(h, u32v) << 16); }

// Round to nearest, ties to even; every NaN becomes 0x7fc0, as in torch.
RK_INLINE u16v narrow(f32v f, bf16) {
  const u32v b = (u32v)f;
  const u32v rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const u32v nan = (u32v)(f != f);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), u16v);
}

#if RK_VECTOR_BYTES == 64
RK_INLINE f32v widen(u16v h, fp16) { return (f32v)_mm512_cvtph_ps((__m256i)h); }
RK_INLINE u16v narrow(f32v f, fp16) { return (u16v)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT); }
#elif RK_VECTOR_BYTES == 32
RK_INLINE f32v widen(u16v h, fp16) { return (f32v)_mm256_cvtph_ps((__m128i)h); }
RK_INLINE u16v narrow(f32v f, fp16) { return (u16v)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT); }
#else
// A half's exponent and mantissa, moved to a float's place, are the value times 2^-112 (subnormals included).
RK_INLINE f32v widen(u16v h, fp16) {
  const u32v w = __builtin_convertvector(h, u32v);
  const f32v magnitude = (f32v)((w & 0x7fffu) << 13) * 0x1p112f;
  const u32v infinite = (u32v)(magnitude >= 65536.f) & 0x7f800000u;
  return (f32v)((u32v)magnitude | infinite | ((w & 0x8000u) << 16));
}
// Normal results round in the integer domain; adding 0.5 aligns a subnormal's last bit (2^-24) with the
// float's.
RK_INLINE u16v narrow(f32v f, fp16) {
  const u32v b = (u32v)f & 0x7fffffffu, sign = ((u32v)f >> 16) & 0x8000u;
  const u32v normal = ((b + 0xfffu + ((b >> 13) & 1u)) >> 13) - (112u << 10);
  const u32v subnormal = (u32v)((f32v)b + 0.5f) - 0x3f000000u;
  const u32v is_small = (u32v)(b < 0x38800000u), is_large = (u32v)(b >= 0x477ff000u), is_nan = (u32v)(f != f);
  u32v r = (subnormal & is_small) | (normal & ~is_small);
  r = (0x7c00u & is_large) | (r & ~is_large);
  r = (0x7e00u & is_nan) | (r & ~is_nan);
  return __builtin_convertvector(r | sign, u16v);
}
#endif

// ---- loads and stores by storage type

template <class T>
struct Traits {  // bf16, fp16
  using scalar = float;
  using vec = f32v;
  static constexpr int lanes = kFloats;
  static RK_INLINE vec load(const T* p) { return widen(load_vector<u16v>(p), T()); }
  static RK_INLINE void store(T* p, vec v) { store_vector(p, narrow(v, T())); }
  static RK_INLINE void store_non_temporal(T* p, vec v) { store_vector_non_temporal(p, narrow(v, T())); }
};
template <class T, class V, int n>
struct Unconverted {  // stored as it is computed with
  using scalar = T;
  using vec = V;
  static constexpr int lanes = n;
  static RK_INLINE vec load(const T* p) { return load_vector<vec>(p); }
  static RK_INLINE void store(T* p, vec v) { store_vector(p, v); }
  static RK_INLINE void store_non_temporal(T* p, vec v) { store_vector_non_temporal(p, v); }
};
template <>
struct Traits<float> : Unconverted<float, f32v, kFloats> {};
template <>
struct Traits<double> : Unconverted<double, f64v, kDoubles> {};

// s in every lane: s - 0, and not s + 0, so that -0 stays -0 and nothing is added.
template <class V, class A>
RK_INLINE V splat_to(A s) {
  return s - V{};
}
template <class T>
RK_INLINE typename Traits<T>::vec splat(typename Traits<T>::scalar s) {
  return splat_to<typename Traits<T>::vec>(s);
}

// The first n lanes, 0 <= n < lanes: absent lanes load as zero and are never stored.
template <class T>
struct Tail {
  int n;
  explicit Tail(int n) : n(n) {}
  typename Traits<T>::vec load(const T* p) const {
    T padded[Traits<T>::lanes] = {};
    for (int i = 0; i < n; ++i) padded[i] = p[i];
    return Traits<T>::load(padded);
  }
  void store(T* p, typename Traits<T>::vec v) const {
    T padded[Traits<T>::lanes];
    Traits<T>::store(padded, v);
    for (int i = 0; i < n; ++i) p[i] = padded[i];
  }
};

#if RK_VECTOR_BYTES == 64
template <>
struct Tail<float> {
  __mmask16 mask;
  explicit Tail(int n) : mask(static_cast<__mmask16>((1u << n) - 1)) {}
  f32v load(const float* p) const { return (f32v)_mm512_maskz_loadu_ps(mask, p); }
  void store(float* p, f32v v) const { _mm512_mask_storeu_ps(p, mask, (__m512)v); }
};
template <>
struct Tail<double> {
  __mmask8 mask;
  explicit Tail(int n) : mask(static_cast<__mmask8>((1u << n) - 1)) {}
  f64v load(const double* p) const { return (f64v)_mm512_maskz_loadu_pd(mask, p); }
  void store(double* p, f64v v) const { _mm512_mask_storeu_pd(p, mask, (__m512d)v); }
};
template <class T>
struct Tail16 {
  __mmask16 mask;
  explicit Tail16(int n) : mask(static_cast<__mmask16>((1u << n) - 1)) {}
  f32v load(const T* p) const { return widen((u16v)_mm256_maskz_loadu_epi16(mask, p), T()); }
  void store(T* p, f32v v) const { _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(v, T())); }
};
template <>
struct Tail<bf16> : Tail16<bf16> {
  using Tail16::Tail16;
};
template <>
struct Tail<fp16> : Tail16<fp16> {
  using Tail16::Tail16;
};
#elif RK_VECTOR_BYTES == 32
template <>
struct Tail<float> {
  __m256i mask;
  explicit Tail(int n)
      : mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
  f32v load(const float* p) const { return (f32v)_mm256_maskload_ps(p, mask); }
  void store(float* p, f32v v) const { _mm256_maskstore_ps(p, mask, (__m256)v); }
};
template <>
struct Tail<double> {
  __m256i mask;
  explicit Tail(int n) : mask(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3))) {}
  f64v load(const double* p) const { return (f64v)_mm256_maskload_pd(p, mask); }
  void store(double* p, f64v v) const { _mm256_maskstore_pd(p, mask, (__m256d)v); }
};
#endif

// One value converted to and from its storage type.
RK_INLINE float to_scalar(float v) { return v; }
RK_INLINE double to_scalar(double v) { return v; }
template <class T>
RK_INLINE float to_scalar(T v) {
  return widen(u16v{} + v.bits, T())[0];
}
RK_INLINE void assign(float& p, float v) { p = v; }
RK_INLINE void assign(double& p, double v) { p = v; }
template <class T>
RK_INLINE void assign(T& p, float v) {
  p.bits = narrow(f32v{} + v, T())[0];
}

}  // namespace RK_ISA
}  // namespace rk
