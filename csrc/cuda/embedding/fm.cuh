// Lookups, their FM interaction and their linear term in one pass over the tables.
//
// x_f [D], the looked-up or pooled row of feature f of a sample (lookup.cuh), goes out side by side
// with the others; a [F, D] are the linear term's weights:
//
//   fm[b]     = sum_{f<g} <x_f, x_g>          linear[b] = sum_f <a_f, x_f>
//
//   grad_x[b, f] = grad_embeddings[b, f] + grad_fm[b] (s - x_f) + grad_linear[b] a_f,     s = sum_f x_f
//   grad_a[f]    = sum_b grad_linear[b] x_f
//
// The sum over pairs is taken as sum_f <x_f, s_{f-1}>, not as half the difference of two squares, which
// cancel. Two runs of features with sums s, s' and interactions y, y' join to s + s' and y + y' + <s, s'>. So
// a warp takes a sample: its groups take the features in turn, each its own run, and then join by shuffles,
// in an order that the widths alone decide. grad_x goes on to the embedding op's backward, which sorts and
// reduces it.
//
// Bytes a sample: forward, each row once, an id a lookup, F D out; backward, F D of x (its second read is of
// L1), of grad_embeddings and of grad_x, and F D of x again for grad_a. Flops: 5 F D
// forward, 8 F D backward: bound by memory.
#pragma once

#include "cuda/embedding/lookup.cuh"

namespace rk {
namespace cuda {

// A run of a sample's features that do not go with one launch leaves its sum, interaction and linear term to
// the next: a row [D + 2] of accumulators a sample.
struct FmTerms {
  const void* linear_weight;  // [F, D] of the launch's features, or null
  void *fm, *linear;          // [B]
  void* carry;                // null: all features go with this launch
  bool first, last;           // of the launches
};

// What a group has of its sample.
struct SampleGroup : Group {
  __device__ int groups() const { return kLanes >> log2_lanes; }
  __device__ int number() const { return (threadIdx.x & (kLanes - 1)) >> log2_lanes; }
  __device__ int64_t sample() const {
    return int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  }
};

template <class T, int n>
__device__ void look_up_and_combine(const Batch<Bags>& batch, const FmTerms& terms, SampleGroup group,
                                    Report* report) {
  using A = accumulate_t<T>;
  const int D = batch.items[0].D;
  const int64_t b = group.sample();
  const T* linear_weight = static_cast<const T*>(terms.linear_weight);
  A* carry = terms.carry ? static_cast<A*>(terms.carry) + b * (D + 2) : nullptr;
  A fm = 0, linear = 0;
  for (int d = group.lane() * n; d - group.lane() * n < D; d += group.lanes() * n) {
    A s[n] = {};
    for (int f = group.number(); d < D && f < batch.n; f += group.groups()) {
      const Bags& bags = batch.items[f];
      A x[n];
      pool<T, n>(bags, TableRows<T, n>{bags}, b, span(bags, b), d, f, report, x);
      T* out = static_cast<T*>(bags.out) + b * bags.stride_ob + d;
      store<n>(out, x);
      Pack<T, n> a;
      if (linear_weight) a = load<n>(linear_weight + int64_t(f) * D + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        T stored;  // the terms are of what goes out
        narrow(stored, x[i]);
        x[i] = widen(stored);
        fm += x[i] * s[i];
        s[i] += x[i];
        if (linear_weight) linear += widen(a.x[i]) * x[i];
      }
    }
    for (int offset = group.lanes(); offset < kLanes; offset *= 2) {
      const bool counts = (threadIdx.x & (2 * offset - 1)) < unsigned(group.lanes());  // <s, s'> once a pair
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        const A other = shuffle_xor(~0u, s[i], offset);
        if (counts) fm += s[i] * other;
        s[i] += other;
      }
    }
    if (!carry || group.number() != 0 || d >= D) continue;
    RK_UNROLL
    for (int i = 0; i < n; ++i) {
      const A before = terms.first ? A(0) : carry[d + i];
      fm += s[i] * before;
      carry[d + i] = s[i] + before;
    }
  }
  const Group warp{5};
  fm = warp.sum(fm);
  linear = warp.sum(linear);
  if (warp.lane() != 0) return;
  if (carry && !terms.first) fm += carry[D], linear += carry[D + 1];
  if (carry) carry[D] = fm, carry[D + 1] = linear;
  if (!terms.last) return;
  narrow(static_cast<T*>(terms.fm)[b], fm);
  if (linear_weight) narrow(static_cast<T*>(terms.linear)[b], linear);
}

// All features have the first one's D, B, log2_lanes and packed.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_fm(const Batch<Bags> batch, const FmTerms terms, Report* report) {
  const SampleGroup group{{batch.items[0].log2_lanes}};
  if (group.sample() >= batch.items[0].B) return;
  if (batch.items[0].packed)
    look_up_and_combine<T, kPack<T>>(batch, terms, group, report);
  else
    look_up_and_combine<T, 1>(batch, terms, group, report);
}

struct FmGrads {
  const void *embeddings, *grad_embeddings;           // [B, F D]
  const void *grad_fm, *grad_linear, *linear_weight;  // [B], [B], [F, D]; what has no gradient is null
  void* grad_lookups;                                 // [B, F D]
  int64_t B, stride_xb, stride_gb;                    // of embeddings and of grad_embeddings
  int32_t F, D, log2_lanes;
  bool packed;
};

template <class T, int n>
__device__ void combine_grads(const FmGrads& grads, SampleGroup group) {
  using A = accumulate_t<T>;
  const int D = grads.D;
  const int64_t b = group.sample();
  const T* x = static_cast<const T*>(grads.embeddings) + b * grads.stride_xb;
  const T* grad_embeddings = static_cast<const T*>(grads.grad_embeddings) + b * grads.stride_gb;
  const T* linear_weight = static_cast<const T*>(grads.linear_weight);
  T* grad_lookups = static_cast<T*>(grads.grad_lookups) + b * grads.F * D;
  const A grad_fm = grads.grad_fm ? widen(static_cast<const T*>(grads.grad_fm)[b]) : A(0);
  const A grad_linear = linear_weight ? widen(static_cast<const T*>(grads.grad_linear)[b]) : A(0);
  for (int d = group.lane() * n; d - group.lane() * n < D; d += group.lanes() * n) {
    A s[n] = {};
    for (int f = group.number(); d < D && f < grads.F; f += group.groups()) {
      const Pack<T, n> row = load<n>(x + f * D + d);
      RK_UNROLL
      for (int i = 0; i < n; ++i) s[i] += widen(row.x[i]);
    }
    for (int offset = group.lanes(); offset < kLanes; offset *= 2) {
      RK_UNROLL
      for (int i = 0; i < n; ++i) s[i] += shuffle_xor(~0u, s[i], offset);
    }
    for (int f = group.number(); d < D && f < grads.F; f += group.groups()) {
      const Pack<T, n> row = load<n>(x + f * D + d);
      Pack<T, n> given, a;
      if (grads.grad_embeddings) given = load<n>(grad_embeddings + f * D + d);
      if (linear_weight) a = load<n>(linear_weight + f * D + d);
      A grad[n];
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        grad[i] = grad_fm * (s[i] - widen(row.x[i]));
        if (grads.grad_embeddings) grad[i] += widen(given.x[i]);
        if (linear_weight) grad[i] += grad_linear * widen(a.x[i]);
      }
      store<n>(grad_lookups + f * D + d, grad);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) embedding_fm_backward(const FmGrads grads) {
  const SampleGroup group{{grads.log2_lanes}};
  if (group.sample() >= grads.B) return;
  if (grads.packed)
    combine_grads<T, kPack<T>>(grads, group);
  else
    combine_grads<T, 1>(grads, group);
}

// Columns of a block of embedding_linear: a sector of float32. Its threads share the samples of a column.
constexpr int kLinearColumns = 8;

// grad_a[c] = sum of grad_linear[b] x[b, c] over all samples, or, where there are `parts`, parts[i, c] over
// samples [i part, (i + 1) part).
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_linear(const FmGrads grads, int64_t part, accumulate_t<T>* parts, T* grad_linear_weight) {
  using A = accumulate_t<T>;
  RK_SHARED(A, sums);
  constexpr int kUnroll = 8, kShares = kThreads / kLinearColumns;
  const int64_t columns = int64_t(grads.F) * grads.D, tiles = (columns + kLinearColumns - 1) / kLinearColumns;
  const int64_t i = blockIdx.x / tiles;
  const int64_t c = blockIdx.x % tiles * kLinearColumns + threadIdx.x % kLinearColumns;
  const int64_t end = (i + 1) * part < grads.B ? (i + 1) * part : grads.B;
  const T *x = static_cast<const T*>(grads.embeddings) + c,
          *grad_linear = static_cast<const T*>(grads.grad_linear);
  A sum = 0;
  for (int64_t b0 = i * part + threadIdx.x / kLinearColumns; c < columns && b0 < end;
       b0 += kUnroll * kShares) {
    A factor[kUnroll], value[kUnroll];
    RK_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t b = b0 + u * kShares;
      factor[u] = b < end ? widen(grad_linear[b]) : A(0);
      value[u] = b < end ? widen(x[b * grads.stride_xb]) : A(0);
    }
    RK_UNROLL
    for (int u = 0; u < kUnroll; ++u) sum += factor[u] * value[u];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kLinearColumns || c >= columns) return;
  A total = 0;
  for (int share = 0; share < kShares; ++share) total += sums[share * kLinearColumns + threadIdx.x];
  if (parts)
    parts[i * columns + c] = total;
  else
    narrow(grad_linear_weight[c], total);
}

// grad_a[c] = the sum of the parts.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_linear_total(const accumulate_t<T>* parts, int64_t n, int64_t columns, T* grad_linear_weight) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= columns) return;
  accumulate_t<T> sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += parts[i * columns + c];
  narrow(grad_linear_weight[c], sum);
}

}  // namespace cuda
}  // namespace rk
