// Huge pages for tables: registration, see memory.h.
#include "memory.h"

#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstring>

#include "../check.h"

namespace rk {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Whether the system's administrator lets programs have them.
static bool huge_pages_allowed() {
  char text[64] = {};
  std::FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!file) return false;
  const bool read = std::fgets(text, sizeof(text), file) != nullptr;
  std::fclose(file);
  return read && !std::strstr(text, "[never]");
}
#endif

// Moves what t holds to huge pages, as far as whole ones fit in it. A batch's lookups go all over a table:
// with pages of 4 KiB each of them misses the translation buffer, which costs as much as the row's own bytes.
static void use_huge_pages(Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const bool allowed = huge_pages_allowed();
  const auto [first, last] = huge_pages_of(t);
  if (!allowed || first >= last) return;
  constexpr int kCollapse =
      25;  // MADV_COLLAPSE, from Linux 6.1 on: at once; before, the system does it by and by
  if (madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0)
    (void)madvise(reinterpret_cast<void*>(first), last - first, kCollapse);
#endif
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) { m.impl("use_huge_pages", TORCH_BOX(&rk::use_huge_pages)); }
