// Which instruction set the kernels run with: the best of the CPU, no better than ATEN_CPU_CAPABILITY
// ("default", "avx2", "avx512") allows, read once.
//
// A kernel is a header of templates in the namespace `rk::RK_ISA`, compiled once for each file of targets/,
// with other vector lengths. RK_DISPATCH_ISA calls the right copy. AVX512-BF16 multiplies pairs of bfloat16,
// which only DIN attention uses: targets/avx512_bf16.cpp has a copy of its kernels, and everything else runs
// as with AVX-512.
#pragma once

#include <cstdint>

namespace rk {

enum class Isa : int64_t { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

Isa isa();

}  // namespace rk

// Whether the compiler knows AVX512-BF16.
#if defined(__x86_64__) && \
    ((defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && __GNUC__ >= 10))
#  define RK_HAS_AVX512_BF16
#endif

#if defined(__x86_64__)
#  define RK_DISPATCH_ISA(fn, ...)                              \
    (rk::isa() >= rk::Isa::avx512 ? rk::avx512::fn(__VA_ARGS__) \
     : rk::isa() == rk::Isa::avx2 ? rk::avx2::fn(__VA_ARGS__)   \
                                  : rk::baseline::fn(__VA_ARGS__))
#else
#  define RK_DISPATCH_ISA(fn, ...) (rk::baseline::fn(__VA_ARGS__))
#endif
