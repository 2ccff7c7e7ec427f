// From a tensor to the kernels' types, groups of lanes and batches of items.
#pragma once

#include "cuda/common/device.cuh"
#include "stable/check.h"
#include "stable/dispatch.h"

namespace rk {
namespace cuda {

// Whether every row of the matrix starts at a multiple of 16 bytes.
inline bool rows_aligned(const Tensor& t) {
  const int64_t stride = t.dim() == 2 ? t.stride(0) : t.size(t.dim() - 1);
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && stride * t.element_size() % 16 == 0;
}

// Whether the rows of a table's state, of accumulators, start where as many of them as a pack of the table
// has may.
inline bool packs_fit(const Tensor& state, const Tensor& table) {
  const int64_t bytes = 16 / table.element_size() * state.element_size();
  return reinterpret_cast<uintptr_t>(state.data_ptr()) % bytes == 0 &&
         state.stride(0) * state.element_size() % bytes == 0;
}

inline uint8_t log2_lanes(int64_t pieces) {
  uint8_t log2 = 0;
  while ((1 << log2) < pieces && (1 << log2) < kLanes) ++log2;
  return log2;
}

inline int32_t checked_int32(int64_t n, const char* what) {
  RK_CHECK(n <= INT32_MAX, "embedding_bag: ", what, " must be less than 2^31, got ", n);
  return static_cast<int32_t>(n);
}

// Batches items into launches of so many blocks each; call flush() when done.
template <class Item, class Launch>
class Batches {
 public:
  explicit Batches(const Launch& launch) : launch_(launch) {}

  void add(Item item, int64_t blocks) {
    if (blocks == 0) return;
    if (batch_.n == Batch<Item>::kItems) flush();
    item.first_block = checked_int32(blocks_, "blocks of a launch");
    batch_.items[batch_.n++] = item;
    blocks_ += blocks;
  }

  void flush() {
    if (batch_.n) launch_(batch_, blocks_);
    batch_.n = 0;
    blocks_ = 0;
  }

 private:
  const Launch& launch_;
  Batch<Item> batch_;
  int64_t blocks_ = 0;
};

inline int64_t blocks_for(int64_t groups, uint8_t log2_lanes) {
  const int64_t per_block = kThreads >> log2_lanes;
  return (groups + per_block - 1) / per_block;
}

constexpr ScalarType kFloating[] = {ScalarType::Float, ScalarType::Double, ScalarType::Half,
                                    ScalarType::BFloat16};

inline int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

template <class Body>
void dispatch_floating(ScalarType dtype, const Body& body) {
  dispatch_dtype<fp16, bf16>(dtype, body);
}

}  // namespace cuda
}  // namespace rk
