// Stands in for HIP's header, so that the test needs clang and no ROCm: declares what csrc/cuda uses of HIP,
// and what torch's headers ask for beside it under __HIPCC__. Device functions are what HIP's do; host
// functions link nowhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define __host__ __attribute__((host))
#define __device__ __attribute__((device))
#define __global__ __attribute__((global))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// HIP passes the number of blocks on as that of waves.
#define __launch_bounds__(threads, blocks) \
  __attribute__((amdgpu_flat_work_group_size(1, threads), amdgpu_waves_per_eu(blocks)))

enum hipError_t { hipSuccess };
enum hipMemcpyKind { hipMemcpyDeviceToHost = 2 };
using hipStream_t = struct ihipStream_t*;
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern "C" {
const char* hipGetErrorString(hipError_t);
hipError_t hipGetLastError();
hipError_t hipSetDevice(int);
hipError_t hipStreamSynchronize(hipStream_t);
hipError_t hipMemcpyAsync(void*, const void*, size_t, hipMemcpyKind, hipStream_t);
// What clang makes of a launch.
hipError_t __hipPushCallConfiguration(dim3, dim3, size_t, hipStream_t);
hipError_t __hipPopCallConfiguration(dim3*, dim3*, size_t*, hipStream_t*);
hipError_t hipLaunchKernel(const void*, dim3, dim3, void**, size_t, hipStream_t);
}

struct ThreadIndex {
  struct {
    __device__ operator unsigned() const { return __builtin_amdgcn_workitem_id_x(); }
  } x;
};
struct BlockIndex {
  struct {
    __device__ operator unsigned() const { return __builtin_amdgcn_workgroup_id_x(); }
  } x;
};
static constexpr ThreadIndex threadIdx{};
static constexpr BlockIndex blockIdx{};

__device__ inline void __syncthreads() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

template <class T>
__device__ inline T __shfl_xor(T value, int mask, int width) {
  const int self = __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0)), other = self ^ mask;
  const int from = other < ((self + width) & -width) ? other : self;
  int words[sizeof(T) / sizeof(int)];
  __builtin_memcpy(words, &value, sizeof value);
  for (int& word : words) word = __builtin_amdgcn_ds_bpermute(4 * from, word);
  __builtin_memcpy(&value, words, sizeof value);
  return value;
}

template <class T>
__device__ inline T atomicMin(T* p, T value) {
  return __hip_atomic_fetch_min(p, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

template <class T>
__device__ inline T atomicCAS(T* p, T expected, T value) {
  __hip_atomic_compare_exchange_strong(p, &expected, value, __ATOMIC_RELAXED, __ATOMIC_RELAXED,
                                       __HIP_MEMORY_SCOPE_AGENT);
  return expected;
}

#define INFINITY __builtin_inff()
__device__ inline float sqrt(float x) { return __builtin_sqrtf(x); }
__device__ inline double sqrt(double x) { return __builtin_sqrt(x); }
__device__ inline float fabs(float x) { return __builtin_fabsf(x); }
__device__ inline double fabs(double x) { return __builtin_fabs(x); }

// In place of ROCm's device library, which clang has not: series, so that these take registers and no call.
__device__ inline double expm1(double x) {
  const double n = __builtin_rint(x * 1.4426950408889634);
  const double r = __builtin_fma(n, -1.9082149292705877e-10, __builtin_fma(n, -0.6931471803691238, x));
  double q = 1;
  for (int i = 13; i > 1; --i) q = __builtin_fma(q, r / i, 1);
  const double power = __builtin_ldexp(1, static_cast<int>(n));
  return __builtin_fma(q * r, power, power - 1);
}
__device__ inline double exp(double x) { return expm1(x) + 1; }
__device__ inline double pow(double x, double y) {
  const double m = __builtin_amdgcn_frexp_mant(x), s = (m - 1) / (m + 1);
  double q = 0;
  for (int i = 31; i > 0; i -= 2) q = __builtin_fma(q, s * s, 2. / i);
  return exp(y * __builtin_fma(q, s, __builtin_amdgcn_frexp_exp(x) * 0.6931471805599453));
}
__device__ inline float pow(float x, float y) { return __builtin_exp2f(y * __builtin_log2f(x)); }

// torch's.
__device__ inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
__device__ inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
__device__ inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
