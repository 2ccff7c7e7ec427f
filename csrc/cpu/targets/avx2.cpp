#if defined(__x86_64__)
// Before any include, so that no inline function of a header is compiled for these instructions and then
// picked by the linker for the whole library: the headers below are this folder's and <immintrin.h> alone.
#  if defined(__clang__)
#    pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#  else
#    pragma GCC target("avx2,fma,f16c")
#  endif
#  define RK_ISA avx2
#  define RK_VECTOR_BYTES 32
#  include "cpu/targets/all_kernels.h"
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#endif
