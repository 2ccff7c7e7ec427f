#if defined(__x86_64__)
// Before any include, so that no inline function of a header is compiled for these instructions and then
// picked by the linker for the whole library: the headers below are this folder's and <immintrin.h> alone.
#  if defined(__clang__)
#    pragma clang attribute push( \
        __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#  else
#    pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#  endif
// GCC 12's own <avx512fintrin.h> builds results on values it leaves uninitialized on purpose.
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  define RK_ISA avx512
#  define RK_VECTOR_BYTES 64
#  include "cpu/targets/all_kernels.h"
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#endif
