// What the embedding kernels are given: plain structs, whose functions are always inlined, because the
// kernels' headers are compiled for several instruction sets.
#pragma once

#include <stdint.h>

#include "cpu/simd/accumulator.h"
#include "cpu/simd/kernel.h"
#include "cpu/tuning.h"
#include "embedding/idle_steps.h"
#include "embedding/params.h"

namespace rk {

// One feature: B bags of the rows of one table. Without offsets bag b has the ids [b L, (b + 1) L), with them
// [starts[b], starts[b + 1]). In mode kNone a bag is one id.
struct Bags {
  const void* weight;  // [R, D], unit stride along D
  int64_t stride_wr, R, D, item_bytes;
  const void* ids;  // [N], int64 or int32
  bool wide_ids;
  int64_t N, B, L;
  const int64_t* starts;           // [B + 1] or null
  const void* per_sample_weights;  // [N] or null
  int64_t padding_idx;             // -1: none
  int64_t mode;
  void* out;  // [B, D], in the backward its gradient
  int64_t stride_ob;

  RK_INLINE int64_t begin(int64_t b) const { return starts ? starts[b] : b * L; }
  // Whether every bag is one row as it is.
  RK_INLINE bool are_rows() const { return L == 1 && !per_sample_weights && padding_idx < 0; }
};

// Whether all of these lookups' ids are in the table.
RK_KERNEL(bool embedding_ids_in_range(const Bags&, Range lookups))
// Bags of one id each, without factors or padding: rows are copied as they are. Returns whether their ids are
// in the table; at one that is not it ends. embedding_bags: those of the other modes.
RK_KERNEL(bool embedding_rows(const Bags&, Range bags))
RK_KERNEL(template <class T> bool embedding_bags(const Bags&, Range bags))
// Bags of mode max in the backward: grad_rows [N, D] gets each lookup's own part of the gradient.
RK_KERNEL(template <class T> void embedding_max_grad_rows(const Bags&, Range bags, T* grad_rows))
// The gradient of the per-sample weights, [N].
RK_KERNEL(template <class T> void embedding_factor_grad(const Bags&, Range bags, T* grad_factors))

// How a feature's lookups become keys: one of row r has the key first_key + r, those of the feature's
// padding_idx or the table's frozen row have skipped_key. The gradient that lookup p of bag b is to get is
// number first_grad + b, or with `one_each` first_grad + p.
struct LookupKeys {
  uint64_t first_key, skipped_key;
  int64_t frozen_row;  // -1: none
  int64_t first_grad;
  int shift;
  bool one_each;
};
// Writes key << shift | number of the gradient for each lookup of these bags, or returns false: an id is
// outside its table.
RK_KERNEL(bool embedding_keys(const Bags&, const LookupKeys&, Range bags, uint64_t* keyed))

// Lookups sorted by (table, row): sorted[p] = key << shift | number of the gradient. A segment is a
// stretch of equal keys, the lookups of one row.
struct Segments {
  const uint64_t* sorted;
  int64_t n;
  int shift;
  const void* const* grad_rows;  // of each number: a gradient, [D]
  const double* factors;         // of each number, or null: all 1

  RK_INLINE uint64_t key(int64_t p) const { return sorted[p] >> shift; }
  RK_INLINE uint64_t grad(int64_t p) const { return sorted[p] & ((uint64_t(1) << shift) - 1); }
};

// A segment over several tiles leaves one partial sum in each of them: `left` of the one that came in,
// `right` of the one that goes on. Each has `bytes`, enough for the widest table: a tile's two may be of two
// tables.
struct Carries {
  char* sums;
  int64_t bytes;

  template <class A>
  RK_INLINE A* left(int64_t tile) const {
    return reinterpret_cast<A*>(sums + 2 * tile * bytes);
  }
  template <class A>
  RK_INLINE A* right(int64_t tile) const {
    return reinterpret_cast<A*>(sums + (2 * tile + 1) * bytes);
  }
};

// A table under exact Adam, and the steps that it has taken.
struct CatchUp : StepClock {
  void* weight;  // [R, D], unit stride along D
  int64_t stride_wr, R, D;
  void* state[2];  // [R, D], rows stride_sr apart
  int64_t stride_sr;
  int32_t* last_steps;  // [R]
};
struct IdleRow {
  int64_t row, last;
};
RK_KERNEL(template <class T> void embedding_catch_up_rows(const CatchUp&, const IdleRow*, int64_t n))
// out [lookups, D], rows stride_out apart: what these lookups' rows are once caught up; the table stays as it
// is. Those of padding_idx are left out. Returns whether the ids are in the table; at one that is not it
// ends.
RK_KERNEL(template <class T> bool embedding_caught_up_rows(const CatchUp&, const Bags&, Range lookups, T* out,
                                                           int64_t stride_out))

// An optimizer's step on a table; optimizer_kernel.h has the formulas.
struct Update {
  Optimizer optimizer;
  void* weight;  // [R, D], unit stride along D
  int64_t stride_wr;
  void* state[2];  // as the rule has them: [R, D], rows stride_sr apart, or [R]; null where there is none
  int64_t stride_sr;
  double lr, beta1, beta2, eps, weight_decay, step, inverse_root, grad_factor, max_norm;
  const CatchUp* idle;  // of exact Adam, or null: a row first takes the steps that it missed
  double own[2];        // FTRL: -lr_power, l1; row-wise RMSprop: the most that a row decays
  double count;         // number of the step
  uint64_t rounding;    // Philox's key, or 0: to the nearest
};

// Lookups of a chunk: rows that are summed, and then stepped on, together.
RK_INLINE int64_t chunk_of(int64_t D) {
  int64_t n = kMostLookups;
  while (n > kFewestLookups && n * D > kChunkValues) n /= 2;
  return n;
}

// What the FM and the linear term add to the gradient of row w, which a feature looked up for sample b. The
// feature is the table's only one and has one id a sample (fm_kernel.h):
//
//   grad_fm[b] (s_b - w) + grad_linear[b] a
struct FmPart {
  const void* grad_fm_s;               // [B, D] of accumulators: grad_fm[b] s_b
  const void *grad_fm, *grad_linear;   // [B]
  const void *weight, *linear_weight;  // [R, D] with rows stride_wr apart; [D]
  int64_t stride_wr;
};

// A table in the backward: key first_key + r is its row r, its gradients' numbers begin with first_grad. A
// row's sum goes to grad_weight [R, D], dense; with `rows` to the next free row of grad_weight [distinct
// rows, D], r itself into `rows`; with `update` into the table. `fm` may be null.
struct TableGrad {
  uint64_t first_key;
  int64_t first_grad, D;
  void* grad_weight;
  int64_t* rows;
  const Update* update;
  const FmPart* fm;
};

// Rows of one table's lookups, summed.
struct SegmentSum {
  Segments segments;
  TableGrad table;
  Carries carries;
  int64_t tile;         // lookups
  int64_t rows_before;  // distinct rows of the table before the first segment that starts in the range
};
// Lookups in whole tiles but where the table begins or ends; scratch [chunk_of(D), D].
RK_KERNEL(template <class T> void embedding_reduce(const SegmentSum&, Range lookups, void* scratch))
// The segment that starts in a tile and goes on after it: adds up its carries, from that of the tile which
// ends at `end`.
RK_KERNEL(template <class T> void embedding_join(const SegmentSum&, int64_t end))
// Zeros to whole cache lines, non-temporal.
RK_KERNEL(void zero_lines(char* p, int64_t bytes))

// A step on the rows of a coalesced sparse gradient: row rows[i] of the table has the gradient values[i],
// [D].
template <class T>
struct SparseStep {
  Update update;
  const int64_t* rows;
  const T* values;
  int64_t D;
};
// scratch [chunk_of(D), D]
RK_KERNEL(template <class T>
          void embedding_optimizer_step(const SparseStep<T>&, Range rows, Accumulator<T>* scratch))

// The FM and the linear term of features of one id a sample, without factors or padding.
template <class T>
struct FmRows {
  const Bags* features;
  int64_t F;
  const T* linear_weight;  // [F, D], or null: no linear term
  T *fm, *linear;          // [B]
};
RK_KERNEL(template <class T> void embedding_fm_rows(FmRows<T>, Range samples))

// The backward of the FM and the linear term, in one dtype; matrices have unit stride along their columns.
struct FmGrads {
  const void* embeddings;       // [B, F D], rows stride_xb apart
  const void* grad_embeddings;  // the same, rows stride_gb apart; or null: zero
  const void* grad_fm;          // [B], or null: zero
  const void* grad_linear;      // [B]
  const void* linear_weight;    // [F, D]; null with grad_linear
  void* grad_lookups;           // [B, F D], contiguous: of embedding_fm_backward
  void* grad_fm_s;              // [B, D] of accumulators, contiguous: of embedding_fm_sums
  int64_t stride_xb, stride_gb, F, D;
};

// The samples' part of the linear weights' gradient, if any, is added to grad_linear_weight [F, D].
RK_KERNEL(template <class T>
          void embedding_fm_backward(const FmGrads&, Range samples, Accumulator<T>* grad_linear_weight))
// What an FmPart needs, grad_fm_s, and the same part.
RK_KERNEL(template <class T>
          void embedding_fm_sums(const FmGrads&, Range samples, Accumulator<T>* grad_linear_weight))

// total [n] = the sum of `parts` rows of sums [parts, n].
template <class T>
struct SumParts {
  const Accumulator<T>* sums;
  int64_t parts, n;
  T* total;
};
RK_KERNEL(template <class T> void embedding_fm_sum(const SumParts<T>&))

}  // namespace rk
