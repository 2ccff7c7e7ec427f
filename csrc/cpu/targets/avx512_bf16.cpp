#include "cpu/runtime/isa.h"
#if defined(RK_HAS_AVX512_BF16)
// Before any other include, as in targets/avx512.cpp.
#  if defined(__clang__)
#    pragma clang attribute push(                                                               \
        __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
        apply_to = function)
#  else
#    pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#  endif
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#  define RK_ISA avx512_bf16
#  define RK_VECTOR_BYTES 64
#  define RK_BF16_PAIRS
#  include "cpu/din_attention/forward_kernel.h"
#  if defined(__clang__)
#    pragma clang attribute pop
#  endif
#endif
