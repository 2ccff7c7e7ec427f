// Stands in for rocThrust's header, which torch's complex.h includes under __HIPCC__.
#pragma once

#include <hip/hip_runtime.h>

namespace thrust {
template <class T>
struct complex {
  T re, im;
  __host__ __device__ constexpr T real() const { return re; }
  __host__ __device__ constexpr T imag() const { return im; }
};
template <class T>
__host__ __device__ complex<T> polar(T, T);
}  // namespace thrust
