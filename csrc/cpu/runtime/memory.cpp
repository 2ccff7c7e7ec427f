// Huge pages for tables: registration, see memory.h.
#include "cpu/runtime/memory.h"

#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstring>

#include "stable/check.h"

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

// Asks the kernel to back t with huge pages, rounding outward to page boundaries: inward, a third of a 6.4 MB
// table would stay on small pages. Random lookups miss the TLB on 4 KiB pages, which costs as much as reading
// the row.
static void use_huge_pages(Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const bool allowed = huge_pages_allowed();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = begin & ~(kHugePage - 1);
  const uintptr_t last = (begin + t.numel() * t.element_size() + kHugePage - 1) & ~(kHugePage - 1);
  if (!allowed) return;
  // MADV_COLLAPSE (Linux 6.1 and later) acts at once; older kernels do it in the background.
  constexpr int kCollapse = 25;
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // ignores unmapped ranges
  for (uintptr_t page = first; page < last; page += kHugePage)
    (void)madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse);
#endif
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) { m.impl("use_huge_pages", TORCH_BOX(&rk::use_huge_pages)); }
