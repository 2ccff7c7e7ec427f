#include "cpu/runtime/isa.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace rk {

static Isa detect() {
  Isa best = Isa::baseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = Isa::avx512;
#  if defined(RK_HAS_AVX512_BF16)
    if (best == Isa::avx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::avx512_bf16;
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
