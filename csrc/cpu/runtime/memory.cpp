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

// Moves what t holds to huge pages, with what else lies on the first and the last of them: without those, a
// third of a table of 6.4 MB. A batch's lookups go all over a table: with pages of 4 KiB each of them misses
// the translation buffer, which costs as much as the row's own bytes.
static void use_huge_pages(Tensor t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const bool allowed = huge_pages_allowed();
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = begin & ~(kHugePage - 1);
  const uintptr_t last = (begin + t.numel() * t.element_size() + kHugePage - 1) & ~(kHugePage - 1);
  if (!allowed) return;
  constexpr int kCollapse =
      25;  // MADV_COLLAPSE, from Linux 6.1 on: at once; before, the system does it by and by
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // what is not mapped stays out
  for (uintptr_t page = first; page < last; page += kHugePage)
    (void)madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse);
#endif
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) { m.impl("use_huge_pages", TORCH_BOX(&rk::use_huge_pages)); }
