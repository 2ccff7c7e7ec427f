// Embedding lookups of many features, forward.
//
// A feature has B bags of rows of a table `weight` [R, D]. With the bag's ids i_1 .. i_n, those equal to
// padding_idx left out, and per-sample weights a_1 .. a_n (1 if none are given),
//
//   sum:  out[b] = sum_p a_p weight[i_p]        mean: out[b] = 1/n sum_p a_p weight[i_p]
//   max:  out[b] = max_p weight[i_p]            none: out[b] = weight[i_b], a bag an id
//
// An empty bag is zeros. An id outside [0, R), and what offsets say beyond the N ids, is never followed: it
// contributes nothing, and the first such place is reported.
//
// Bytes: each looked-up row once, 4 or 8 an id, each output row once; flops: 2 D a lookup. Bound by memory:
// what counts is how many rows are on their way. A group of lanes takes a bag, 16 bytes of the row a lane, so
// a warp holds several bags of a narrow table; kUnroll rows are loaded at a time; and one launch takes all
// features.
#pragma once

#include "cuda/common/device.cuh"
#include "embedding/params.h"

namespace rk {
namespace cuda {

// One feature. Bag b has the ids [b L, (b + 1) L), beside offsets [offsets[b], offsets[b + 1]) of all L.
struct Bags {
  const void* weight;  // [R, D], rows stride_wr apart
  int64_t stride_wr, R;
  const void* ids;
  const void* offsets;             // [B], the last bag ends at L; or null
  const void* per_sample_weights;  // one an id, or null
  void* out;                       // [B, D], rows stride_ob apart; in the backward its gradient
  int64_t B, L;
  int64_t padding_idx;  // -1: none
  int32_t stride_ob, D;
  int32_t first_block;  // of the launch for this feature, its first
  uint8_t mode;
  uint8_t log2_lanes;  // of the group that takes a bag
  bool wide_ids : 1, wide_offsets : 1;
  bool packed : 1;  // rows are loaded by 16 bytes: all of them, and D, are multiples of that

  __device__ int64_t id(int64_t p) const { return read_int(ids, wide_ids, p); }
  __device__ bool has(int64_t id) const { return id >= 0 && id < R; }
  __device__ bool keeps(int64_t id) const { return has(id) && id != padding_idx; }
};

// The smallest (feature of the launch, kind, position) that is out of range. The host starts it at all ones.
using Report = unsigned long long;
enum ReportKind : int { kBadOffset, kBadId };
constexpr int kPositionBits = 48;

__device__ inline void report_first(Report* report, int feature, ReportKind kind, int64_t position) {
  if (report) atomicMin(report, static_cast<Report>(2 * feature + kind) << kPositionBits | position);
}

// The ids of bag b. Whatever the offsets are, the bags' spans stay within the L ids and cover all of them.
struct Span {
  int64_t begin, end;
  bool sound;  // they are what the offsets say
};

__device__ inline Span span(const Bags& bags, int64_t b) {
  if (!bags.offsets) return {b * bags.L, (b + 1) * bags.L, true};
  const int64_t N = bags.L, begin = read_int(bags.offsets, bags.wide_offsets, b);
  const int64_t end = b + 1 < bags.B ? read_int(bags.offsets, bags.wide_offsets, b + 1) : N;
  const int64_t first = b == 0 || begin < 0 ? 0 : begin > N ? N : begin;
  const int64_t last = end < first ? first : end > N ? N : end;
  return {first, last, first == begin && last == end};
}

// Rows of the table as they are. What reads rows otherwise has these, too: columns [d, d + n) of a row in two
// parts, so that the loads of kAtOnce rows are on their way together.
template <class T, int n>
struct TableRows {
  using Row = Pack<T, n>;
  static constexpr int kAtOnce = 4;
  const Bags& bags;

  __device__ Row load(int64_t id, int d) const {
    return cuda::load<n>(static_cast<const T*>(bags.weight) + id * bags.stride_wr + d);
  }
  __device__ Pack<T, n> values(const Row& row) const { return row; }
};

// out = columns [d, d + n) of bag b, whose ids are `ids`. What is out of range is reported at column 0.
template <class T, int n, class Rows>
__device__ inline void pool(const Bags& bags, const Rows& rows_of, int64_t b, Span ids, int d, int feature,
                            Report* report, accumulate_t<T> (&out)[n]) {
  using A = accumulate_t<T>;
  constexpr int kUnroll = Rows::kAtOnce;
  const T* factors = static_cast<const T*>(bags.per_sample_weights);
  if (d == 0 && !ids.sound) report_first(report, feature, kBadOffset, b);

  RK_UNROLL
  for (int i = 0; i < n; ++i) out[i] = bags.mode == kMax ? -A(INFINITY) : A(0);
  int64_t count = 0;
  for (int64_t p = ids.begin; p < ids.end; p += kUnroll) {
    typename Rows::Row rows[kUnroll];
    A factor[kUnroll];
    bool keep[kUnroll];
    RK_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const bool there = p + u < ids.end;
      const int64_t id = there ? bags.id(p + u) : 0;
      keep[u] = there && bags.keeps(id);
      factor[u] = A(1);
      if (keep[u]) {
        rows[u] = rows_of.load(id, d);
        if (factors) factor[u] = widen(factors[p + u]);
      } else if (there && d == 0 && !bags.has(id)) {
        report_first(report, feature, kBadId, p + u);
      }
    }
    RK_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (!keep[u]) continue;
      ++count;
      const Pack<T, n> row = rows_of.values(rows[u]);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        const A x = widen(row.x[i]);
        if (bags.mode == kMax)
          out[i] = x > out[i] || x != x ? x : out[i];  // a NaN stays
        else
          out[i] += factor[u] * x;
      }
    }
  }
  RK_UNROLL
  for (int i = 0; i < n; ++i) {
    if (bags.mode == kMax && count == 0) out[i] = A(0);
    if (bags.mode == kMean && count > 1) out[i] /= A(count);
  }
}

template <class T, int n, class Rows>
__device__ void pool(const Bags& bags, const Rows& rows, int64_t b, Group group, int feature,
                     Report* report) {
  const Span ids = span(bags, b);
  for (int d = group.lane() * n; d < bags.D; d += group.lanes() * n) {
    accumulate_t<T> x[n];
    pool<T, n>(bags, rows, b, ids, d, feature, report, x);
    store<n>(static_cast<T*>(bags.out) + b * bags.stride_ob + d, x);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_bag(const Batch<Bags> batch, Report* report) {
  const int feature = find(batch, &Bags::first_block, static_cast<int32_t>(blockIdx.x));
  const Bags& bags = batch.items[feature];
  const Group group{bags.log2_lanes};
  const int64_t b = int64_t(blockIdx.x - bags.first_block) * group.per_block() + group.index();
  if (b >= bags.B) return;
  if (bags.packed)
    pool<T, kPack<T>>(bags, TableRows<T, kPack<T>>{bags}, b, group, feature, report);
  else
    pool<T, 1>(bags, TableRows<T, 1>{bags}, b, group, feature, report);
}

}  // namespace cuda
}  // namespace rk
