// How a kernel is declared: once, beside the struct of its parameters, for the code that calls it
// (runtime/isa.h) and for its copies. Parameters come by value: what lies behind a reference is read again
// after every store.
#pragma once

#include <stdint.h>

// Always inlined: a copy compiled for one instruction set could be the linker's choice for all others.
#define RK_INLINE inline __attribute__((always_inline))

namespace rk {

// What a call works on: [begin, end) of the samples, rows, bags or lookups.
struct Range {
  int64_t begin, end;
};

}  // namespace rk

#if defined(__x86_64__)
#  define RK_KERNEL(...)    \
    namespace baseline {    \
    __VA_ARGS__;            \
    }                       \
    namespace avx2 {        \
    __VA_ARGS__;            \
    }                       \
    namespace avx512 {      \
    __VA_ARGS__;            \
    }                       \
    namespace avx512_bf16 { \
    __VA_ARGS__;            \
    }
#else
#  define RK_KERNEL(...) \
    namespace baseline { \
    __VA_ARGS__;         \
    }
#endif
