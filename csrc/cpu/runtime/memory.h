// Memory of tensors: output buffers of many megabytes, inputs with rows that lie together.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#if defined(__linux__)
#  include <sys/mman.h>
#endif

#include "cpu/simd/non_temporal.h"

namespace rk {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
constexpr uintptr_t kHugePage = 2 << 20;
// Where the first huge page begins and the last one ends that lie within a tensor's memory.
inline std::pair<uintptr_t, uintptr_t> huge_pages_of(const torch::stable::Tensor& t) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {(begin + kHugePage - 1) & ~(kHugePage - 1),
          (begin + t.numel() * t.element_size()) & ~(kHugePage - 1)};
}
#endif

// torch::stable::new_empty, asking for huge pages where a large buffer has no pages yet. The allocator maps
// many of them afresh at every call, and the system zeroes and maps each page on first touch: with pages of 4
// KiB that costs several times the bytes' own traffic. Memory that is used again has its pages, and asking
// would only cost time. Where huge pages are off the request does nothing.
inline torch::stable::Tensor new_empty_paged(const torch::stable::Tensor& like,
                                             torch::headeronly::IntHeaderOnlyArrayRef size,
                                             std::optional<torch::headeronly::ScalarType> dtype = {}) {
  torch::stable::Tensor t = torch::stable::new_empty(like, size, dtype);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto [first, last] = huge_pages_of(t);
  unsigned char resident = 0;
  if (last >= first + kHugePage && mincore(reinterpret_cast<void*>(last - kHugePage), 1, &resident) == 0 &&
      !(resident & 1))
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

inline bool is_non_temporal(const torch::stable::Tensor& out) {
  return is_non_temporal(out.data_ptr(), out.numel() * out.element_size());
}

// A tensor whose rows the kernels can read: itself where its last dimension has unit stride, else a copy.
inline torch::stable::Tensor unit_stride_last(const torch::stable::Tensor& t) {
  const int64_t d = t.dim() - 1;
  return t.stride(d) == 1 || t.size(d) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace rk
