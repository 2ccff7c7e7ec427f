// Memory of tensors: output buffers of many megabytes, inputs with rows that lie together.
#pragma once

#include <optional>
#include <utility>
#if defined(__linux__)
#  include <sys/mman.h>
#endif

#include "cpu/simd/non_temporal.h"
#include "cpu/tuning.h"
#include "stable/tensor.h"

namespace rk {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Where the first huge page begins and the last one ends that lie within a tensor's memory.
inline std::pair<uintptr_t, uintptr_t> huge_pages_of(const Tensor& t) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {(begin + kHugePage - 1) & ~(kHugePage - 1),
          (begin + t.numel() * t.element_size()) & ~(kHugePage - 1)};
}
#endif

// torch::stable::new_empty with huge pages for a large buffer that has no pages yet: the allocator maps it
// afresh at every call, and zeroing and mapping 4 KiB pages on first touch costs several times the bytes' own
// traffic. Memory that is reused has its pages; asking again would only cost time.
inline Tensor new_empty_paged(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef size,
                              std::optional<ScalarType> dtype = {}) {
  Tensor t = torch::stable::new_empty(like, size, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto [first, last] = huge_pages_of(t);
  unsigned char resident = 0;
  if (last >= first + kHugePage && mincore(reinterpret_cast<void*>(last - kHugePage), 1, &resident) == 0 &&
      !(resident & 1))
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

inline bool is_non_temporal(const Tensor& out) {
  return is_non_temporal(out.data_ptr(), out.numel() * out.element_size());
}

}  // namespace rk
