#include "cpu/runtime/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#  include <cpuid.h>
#endif

namespace rk {

#if defined(__x86_64__)
// Clang's __builtin_cpu_supports does not know their names, of this one before 19.
[[maybe_unused]] static bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;
}
static bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 29 & 1;
}
#endif

static Isa detect() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
#  if defined(RK_HAS_AVX512_BF16)
    if (best == Isa::avx512 && has_avx512_bf16()) best = Isa::avx512_bf16;
#  endif
  }
#endif
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  if (wanted && !std::strcmp(wanted, "default")) return Isa::baseline;
  if (wanted && !std::strcmp(wanted, "avx2")) return std::min(best, Isa::avx2);
  if (wanted && !std::strcmp(wanted, "avx512")) return std::min(best, Isa::avx512);
  return best;
}

Isa isa() {
  static const Isa chosen = detect();
  return chosen;
}

static int64_t cpu_isa() { return static_cast<int64_t>(isa()); }

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&rk::cpu_isa));
}
