// What kernels need beside the language: what CUDA and HIP spell differently, arithmetic types, and packs of
// elements that are loaded and stored in one instruction. No torch header, so that any compiler reads it.
#pragma once

#include <stdint.h>

#if defined(__HIPCC__)
#  include <hip/hip_bf16.h>
#  include <hip/hip_fp16.h>
#  include <hip/hip_runtime.h>
#  define RK_RUNTIME(name) hip##name  // the runtime's types, functions and constants
#else
#  include <cuda_bf16.h>
#  include <cuda_fp16.h>
#  define RK_RUNTIME(name) cuda##name
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#  define RK_UNROLL _Pragma("unroll")
#  define RK_SHARED(T, name)                                   \
    extern __shared__ __align__(16) unsigned char rk_shared[]; \
    T* const name = reinterpret_cast<T*>(rk_shared)
#endif

namespace rk {
namespace cuda {

#if defined(__HIPCC__)
using fp16 = __half;
using bf16 = __hip_bfloat16;
#else
using fp16 = __half;
using bf16 = __nv_bfloat16;
#endif

// Threads of every block. Groups are powers of two of them, up to kLanes, and never straddle a warp.
constexpr int kThreads = 256, kLanes = 32;
// Blocks that a multiprocessor must be able to hold: at most 128 registers a thread. With nothing said ptxas
// spills to get more of them.
constexpr int kMinBlocks = 2;

// float64 accumulates in itself, everything else in float32.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(fp16 x) { return __half2float(x); }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }

__device__ inline void narrow(float& to, float x) { to = x; }
__device__ inline void narrow(double& to, double x) { to = x; }
__device__ inline void narrow(fp16& to, float x) { to = __float2half(x); }
__device__ inline void narrow(bf16& to, float x) { to = __float2bfloat16(x); }

template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  T x[n];
};
// Elements of a 16-byte load.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <int n, class T>
__device__ inline Pack<T, n> load(const T* p) {
  return *reinterpret_cast<const Pack<T, n>*>(p);
}

template <int n, class T>
__device__ inline void store(T* p, const accumulate_t<T> (&x)[n]) {
  Pack<T, n> pack;
  RK_UNROLL
  for (int i = 0; i < n; ++i) narrow(pack.x[i], x[i]);
  *reinterpret_cast<Pack<T, n>*>(p) = pack;
}

template <int n, class T>
__device__ inline void store(T* p, const Pack<T, n>& x) {
  *reinterpret_cast<Pack<T, n>*>(p) = x;
}

// *p, where the other choice is a kernel's parameter: HIP's compiler would choose between the two addresses
// instead, and copy all parameters to memory to have one. What is volatile it leaves alone.
template <class T>
__device__ inline T load_apart(const T* p) {
#if defined(__HIPCC__)
  uint64_t words[sizeof(T) / 8];
  RK_UNROLL
  for (unsigned i = 0; i < sizeof(T) / 8; ++i) words[i] = reinterpret_cast<const volatile uint64_t*>(p)[i];
  T value;
  __builtin_memcpy(&value, words, sizeof value);
  return value;
#else
  return *p;
#endif
}

// The value of the lane whose number differs in the bits of `offset`. `mask` has the lanes of this warp that
// take part; HIP needs none, because lanes that exchange values here run in step.
template <class T>
__device__ inline T shuffle_xor([[maybe_unused]] unsigned mask, T value, int offset) {
#if defined(__HIPCC__)
  return __shfl_xor(value, offset, kLanes);
#else
  return __shfl_xor_sync(mask, value, offset, kLanes);
#endif
}

// What the lanes read before is read, and what they wrote is seen, by those of `mask`.
__device__ inline void order_lanes([[maybe_unused]] unsigned mask) {
#if !defined(__HIPCC__)
  __syncwarp(mask);
#endif
}

// 2^log2_lanes neighbouring threads that share a piece of work.
struct Group {
  int log2_lanes;

  __device__ int lanes() const { return 1 << log2_lanes; }
  __device__ int lane() const { return threadIdx.x & (lanes() - 1); }
  __device__ int index() const { return threadIdx.x >> log2_lanes; }
  __device__ int per_block() const { return kThreads >> log2_lanes; }
  __device__ unsigned mask() const {
    const unsigned ones = log2_lanes == 5 ? ~0u : (1u << lanes()) - 1;
    return ones << (threadIdx.x & (kLanes - 1) & ~(lanes() - 1));
  }
  // The sum over the group's lanes, in a fixed order, in all of them.
  template <class T>
  __device__ T sum(T value) const {
    for (int offset = lanes() / 2; offset > 0; offset /= 2) value += shuffle_xor(mask(), value, offset);
    return value;
  }
};

__device__ inline int64_t read_int(const void* p, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// Pieces of work that go with one launch: a kernel's parameter, of which every CUDA and HIP allows 4 KiB, so
// no copy to the device is needed and a graph captures it.
template <class Item>
struct Batch {
  static constexpr int kItems = 3968 / sizeof(Item);
  Item items[kItems];
  int32_t n = 0;
};

// The last item whose `first` is at most `at`; items are in the order of `first`.
template <class Item, class Base, class Int>
__device__ inline int find(const Batch<Item>& batch, Int Base::* first, Int at) {
  int low = 0, high = batch.n;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.items[middle].*first <= at ? low : high) = middle;
  }
  return low;
}

}  // namespace cuda
}  // namespace rk
