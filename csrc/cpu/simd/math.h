// Elementary functions of a vector of accumulators, for one instruction set.
#pragma once

#include "cpu/simd/vec.h"

namespace rk {
namespace RK_ISA {

// Without the call of the library that __builtin_sqrtf makes of a negative x.
RK_INLINE float square_root(float x) {
#if RK_VECTOR_BYTES > 16
  return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x)));
#else
  return __builtin_sqrtf(x);
#endif
}
RK_INLINE double square_root(double x) {
#if RK_VECTOR_BYTES > 16
  return _mm_cvtsd_f64(_mm_sqrt_pd(_mm_set1_pd(x)));
#else
  return __builtin_sqrt(x);
#endif
}
RK_INLINE f32v square_root(f32v x) {
#if RK_VECTOR_BYTES == 64
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif RK_VECTOR_BYTES == 32
  return (f32v)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kFloats; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
RK_INLINE f64v square_root(f64v x) {
#if RK_VECTOR_BYTES == 64
  return (f64v)_mm512_sqrt_pd((__m512d)x);
#elif RK_VECTOR_BYTES == 32
  return (f64v)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

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
// the low bits, with the exponents' bias those of 2^n. 2^f, |f| <= 1/2, is a polynomial: for float
// interpolated at Chebyshev nodes (relative error 3e-9), for double Taylor's (2e-17). Any NaN stays.
RK_INLINE f32v exp(f32v x) {
  static constexpr float kExp2[] = {1.f,           .693147206703f, .240226509223f, .0555032722667f,
                                    .00961805668f, .00134004282f,  .000154614447f};
  const f32v magic = splat<float>(0x1.8p23f + 127), log2e = splat<float>(1.44269504089f);
  x = clamp(x, splat<float>(-87.f), splat<float>(88.f));
  const f32v t = x * log2e + magic, n = t - magic;
  return horner(x * log2e - n, kExp2) * (f32v)((i32v)t << 23);
}
RK_INLINE f64v exp(f64v x) {
  static constexpr double kTaylor[] = {
      1.,        1.,         1. / 2,      1. / 6,       1. / 24,       1. / 120,       1. / 720,
      1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  // ln 2 in two parts, the first with so few bits that n times it is exact.
  const double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  const f64v magic = splat<double>(0x1.8p52 + 1023);
  x = clamp(x, splat<double>(-708.), splat<double>(709.));
  const f64v t = x * 1.4426950408889634 + magic, n = t - magic;
  return horner(x - n * ln2_high - n * ln2_low, kTaylor) * (f64v)((i64v)t << 52);
}

// 0 far below zero, where 1 + e^-x is infinite.
RK_INLINE f32v sigmoid(f32v x) { return x < -88.f ? f32v{} : reciprocal(1 + exp(-x)); }
RK_INLINE f64v sigmoid(f64v x) { return x < -709. ? f64v{} : reciprocal(1 + exp(-x)); }

// x P(x^2) / Q(x^2), fitted for the least relative error up to 9, from where a float's tanh is 1: 2e-8, and
// 3.2e-7 with its own rounding. Never beyond 1: a derivative 1 - tanh^2 is not negative. A NaN stays.
RK_INLINE f32v tanh(f32v x) {
  static constexpr float kP[] = {.999999979012f, .13379718884f, .00349403567842f, 2.05834993519e-5f,
                                 1.33190959653e-8f};
  static constexpr float kQ[] = {1.f, .467130341238f, .0258710774639f, .000328309465802f, 7.7620295175e-7f};
  x = clamp(x, splat<float>(-9.02f), splat<float>(9.02f));
  const f32v square = x * x;
  return clamp(x * horner(square, kP) * reciprocal(horner(square, kQ)), splat<float>(-1.f),
               splat<float>(1.f));
}
// 1 - 2 / (e^2x + 1), and for small |x| the rational function of Cephes (Moshier).
RK_INLINE f64v tanh(f64v x) {
  static constexpr double kP[] = {-1.61468768441708447952e3, -9.92877231001918586564e1,
                                  -9.64399179425052238628e-1};
  static constexpr double kQ[] = {4.84406305325125486048e3, 2.23548839060100448583e3,
                                  1.12811678491632931402e2, 1.};
  const f64v square = x * x, large = 1 - 2 / (exp(2 * x) + 1);
  return square < .4 ? x + x * square * horner(square, kP) / horner(square, kQ) : large;
}

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
