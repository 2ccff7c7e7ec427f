// Ids that need not be rows of their table -> rows: embedding/params.h, Known.
//
// Bytes: 4 or 8 read and 8 written an id, bound by memory; one launch takes all features. A thread has kIds
// ids, which lie kThreads apart.
#pragma once

#include "cuda/common/device.cuh"
#include "embedding/params.h"

namespace rk {
namespace cuda {

// One feature.
struct KnownIds {
  Known known;
  const void* ids;  // [n], int64 or int32
  int64_t* rows;    // [n]
  int64_t n;
  int32_t first_block;  // of the launch for this feature, its first
  bool wide;
};

constexpr int kIds = 4;

__global__ void __launch_bounds__(kThreads, kMinBlocks) known_rows(const Batch<KnownIds> batch) {
  const KnownIds& f = batch.items[find(batch, &KnownIds::first_block, static_cast<int32_t>(blockIdx.x))];
  const int64_t first = int64_t(blockIdx.x - f.first_block) * kThreads * kIds + threadIdx.x;
  RK_UNROLL
  for (int i = 0; i < kIds; ++i) {
    const int64_t p = first + i * kThreads;
    if (p < f.n) f.rows[p] = f.known.row_of(read_int(f.ids, f.wide, p));
  }
}

}  // namespace cuda
}  // namespace rk
