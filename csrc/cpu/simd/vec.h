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

#include "cpu/simd/storage.h"
#include "cpu/simd/stream.h"

namespace rk {
namespace RK_ISA {

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
  typedef E unaligned __attribute__((vector_size(sizeof(E) * N), aligned(1), may_alias));
};

constexpr int kFloats = RK_VECTOR_BYTES / 4, kDoubles = RK_VECTOR_BYTES / 8;
using f32v = VectorOf<float, kFloats>::type;
using f64v = VectorOf<double, kDoubles>::type;
using u32v = VectorOf<uint32_t, kFloats>::type;
using i32v = VectorOf<int32_t, kFloats>::type;
using i64v = VectorOf<int64_t, kDoubles>::type;
using u16v = VectorOf<uint16_t, kFloats>::type;

#define RK_INLINE static inline __attribute__((always_inline))

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

// Stores v past the caches, where the processor can. An ordinary store first reads the line it is to write;
// this one does not, but whoever reads the line next has to fetch it from memory, and a line that is not
// written at once and as a whole costs more than it saves. p is a multiple of V's size.
template <class V>
RK_INLINE void stream_vector(void* p, V v) {
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
// Between streamed stores and what tells another thread of them.
RK_INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- 16-bit storage
// -------------------------------------------------------------------------------------------

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
// ---------------------------------------------------------------------------

template <class T>
struct Traits {  // bf16, fp16
  using scalar = float;
  using vec = f32v;
  static constexpr int lanes = kFloats;
  RK_INLINE vec load(const T* p) { return widen(load_vector<u16v>(p), T()); }
  RK_INLINE void store(T* p, vec v) { store_vector(p, narrow(v, T())); }
  RK_INLINE void stream(T* p, vec v) { stream_vector(p, narrow(v, T())); }
};
template <>
struct Traits<float> {
  using scalar = float;
  using vec = f32v;
  static constexpr int lanes = kFloats;
  RK_INLINE vec load(const float* p) { return load_vector<vec>(p); }
  RK_INLINE void store(float* p, vec v) { store_vector(p, v); }
  RK_INLINE void stream(float* p, vec v) { stream_vector(p, v); }
};
template <>
struct Traits<double> {
  using scalar = double;
  using vec = f64v;
  static constexpr int lanes = kDoubles;
  RK_INLINE vec load(const double* p) { return load_vector<vec>(p); }
  RK_INLINE void store(double* p, vec v) { store_vector(p, v); }
  RK_INLINE void stream(double* p, vec v) { stream_vector(p, v); }
};

template <class T>
RK_INLINE typename Traits<T>::vec splat(typename Traits<T>::scalar s) {
  return s - typename Traits<T>::vec{};  // s - 0, and not s + 0, so that -0 stays -0
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

// ---- elementary functions of a vector of accumulators
// -----------------------------------------------------------

// 1 / x of finite x.
RK_INLINE f32v reciprocal(f32v x) {
#if RK_VECTOR_BYTES == 64
  // The divider takes 16 cycles a vector; 14 good bits and one step of Newton's iteration are exact to an
  // ulp.
  const f32v r = (f32v)_mm512_rcp14_ps((__m512)x);
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}
RK_INLINE f64v reciprocal(f64v x) { return 1. / x; }

// 1 / sqrt(x) of positive x.
RK_INLINE f32v inverse_root(f32v x) {
#if RK_VECTOR_BYTES == 64
  const f32v r = (f32v)_mm512_rsqrt14_ps((__m512)x);
  return x < __builtin_inff() ? r * (1.5f - .5f * x * r * r) : r;
#else
  f32v r;
  for (int i = 0; i < kFloats; ++i) r[i] = 1.f / __builtin_sqrtf(x[i]);
  return r;
#endif
}
RK_INLINE f64v inverse_root(f64v x) {
  f64v r;
  for (int i = 0; i < kDoubles; ++i) r[i] = 1. / __builtin_sqrt(x[i]);
  return r;
}

template <class V>
RK_INLINE V clamp(V x, V low, V high) {  // a NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <class V, class A, int n>
RK_INLINE V horner(V x, const A (&coefficient)[n]) {
  V y = x * coefficient[n - 1] + coefficient[n - 2];
#pragma GCC unroll 16
  for (int i = n - 3; i >= 0; --i) y = y * x + coefficient[i];
  return y;
}

// e^x = 2^n 2^f with n the integer nearest to x log2(e): adding 1.5 * 2^(bits of the mantissa) leaves n in
// the low bits. 2^f, |f| <= 1/2, is a polynomial: for float interpolated at Chebyshev nodes (relative error
// 3e-9), for double Taylor's (2e-17).
RK_INLINE f32v exp(f32v x) {
  static constexpr float kExp2[] = {1.f,           .693147206703f, .240226509223f, .0555032722667f,
                                    .00961805668f, .00134004282f,  .000154614447f};
  const f32v magic = splat<float>(0x1.8p23f), log2e = splat<float>(1.44269504089f);
  x = clamp(x, splat<float>(-87.f), splat<float>(88.f));
  const f32v t = x * log2e + magic, n = t - magic;
  return (f32v)((i32v)horner(x * log2e - n, kExp2) + ((i32v)t << 23));
}
RK_INLINE f64v exp(f64v x) {
  static constexpr double kTaylor[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  // ln 2 in two parts, the first with so few bits that n times it is exact.
  const double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  const f64v magic = splat<double>(0x1.8p52);
  x = clamp(x, splat<double>(-708.), splat<double>(709.));
  const f64v t = x * 1.4426950408889634 + magic, n = t - magic;
  return (f64v)((i64v)horner(x - n * ln2_high - n * ln2_low, kTaylor) + ((i64v)t << 52));
}

// 0 far below zero, where 1 + e^-x is infinite.
RK_INLINE f32v sigmoid(f32v x) { return x < -88.f ? f32v{} : reciprocal(1 + exp(-x)); }
RK_INLINE f64v sigmoid(f64v x) { return x < -709. ? f64v{} : reciprocal(1 + exp(-x)); }

// A NaN stays, and has all of the gradient: as torch's.
template <class V>
RK_INLINE V relu(V x) {
  return V{} > x ? V{} : x;
}
template <class V>
RK_INLINE V relu_backward(V grad, V x) {
  return x <= 0 ? V{} : grad;
}

// The sigmoid of |x| <= 1, where its nearest poles, +-i pi, leave little for a polynomial to do: 1/2 + x
// q(x^2), error 6e-8, one in the last place.
RK_INLINE f32v sigmoid_unit(f32v x) {
  static constexpr float kQ[] = {.249999419047f, -.0208254095019f, .00205392898593f, -.000169423749052f};
  return x * horner(x * x, kQ) + .5f;
}
RK_INLINE f64v sigmoid_unit(f64v x) { return sigmoid(x); }

}  // namespace RK_ISA
}  // namespace rk
