// Lookups of tables under exact Adam, and its fused step, each of which catches up with a row's idle steps as
// it comes to it (idle_steps.cuh). The lookup leaves the rows as they are: it reads w, m and v and writes
// none of them. The step, which has to write them, takes what they missed before its own.
//
// Bytes a lookup: w, m and v; a stepped row: they and its gradient, w, m and v written. Flops a value: 9 and
// 3 a term, two more with the step's square root and division.
#pragma once

#include "cuda/embedding/idle_steps.cuh"
#include "cuda/embedding/lookup.cuh"
#include "cuda/embedding/optimizer.cuh"

namespace rk {
namespace cuda {

// One feature; `packed`: its rows, the state's and the output's are packs.
struct ExactBags : Bags {
  const void* state[2];  // [R, D], rows stride_sr apart
  int64_t stride_sr;
  const int32_t* last_steps;
  StepClock clock;
};

// Rows of the table as the clock's step has them.
template <class T, int n>
struct CaughtUpRows {
  using A = accumulate_t<T>;
  struct Row {
    Pack<T, n> w;
    Pack<A, n> m, v;
    int32_t last;
  };
  static constexpr int kAtOnce =
      2;  // three packs a row and what is made of them: four do not fit in registers
  const ExactBags& bags;

  __device__ Row load(int64_t id, int d) const {
    const A *const m = static_cast<const A*>(bags.state[0]), *const v = static_cast<const A*>(bags.state[1]);
    return {cuda::load<n>(static_cast<const T*>(bags.weight) + id * bags.stride_wr + d),
            cuda::load<n>(m + id * bags.stride_sr + d), cuda::load<n>(v + id * bags.stride_sr + d),
            bags.last_steps[id]};
  }
  __device__ Pack<T, n> values(Row row) const {
    Idle<A>(bags.clock, row.last).take(row.w, row.m, row.v);
    return row.w;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_bag_exact(const Batch<ExactBags> batch, Report* report) {
  const int feature = find(batch, &ExactBags::first_block, static_cast<int32_t>(blockIdx.x));
  const ExactBags& bags = batch.items[feature];
  const Group group{bags.log2_lanes};
  const int64_t b = int64_t(blockIdx.x - bags.first_block) * group.per_block() + group.index();
  if (b >= bags.B) return;
  if (bags.packed)
    pool<T, kStatePack<T>>(bags, CaughtUpRows<T, kStatePack<T>>{bags}, b, group, feature, report);
  else
    pool<T, 1>(bags, CaughtUpRows<T, 1>{bags}, b, group, feature, report);
}

// A table and its step, the one after the clock's.
struct ExactUpdate : Update {
  StepClock clock;
  int32_t* last_steps;
};

template <class T, int n>
__device__ void update_exact_row(const ExactUpdate& u, int64_t row, const T* grad, Group group) {
  using A = accumulate_t<T>;
  T* const weight = static_cast<T*>(u.weight) + row * u.stride_wr;
  A *const s1 = static_cast<A*>(u.state[0]) + row * u.stride_sr, *const s2 = static_cast<A*>(u.state[1]) +
                                                                             row * u.stride_sr;
  const Now now = now_of(u);
  const A factor = clipped_factor<A>(u, now, grad, group), keep = A(1 - u.lr * u.weight_decay);
  const Idle<A> idle(u.clock, last_step_of(u.last_steps, row, group));
  if (group.lane() == 0) u.last_steps[row] = static_cast<int32_t>(u.clock.step + 1);
  for (int d = group.lane() * n; d < u.D; d += group.lanes() * n) {
    const Pack<T, n> grads = load<n>(grad + d);
    Pack<T, n> weights = load<n>(weight + d);
    Pack<A, n> m = load<n>(s1 + d), v = load<n>(s2 + d);
    idle.take(weights, m, v);
    A w[n];
    RK_UNROLL
    for (int i = 0; i < n; ++i) {
      w[i] = keep * widen(weights.x[i]);
      adam(u, now, w[i], factor * widen(grads.x[i]), m.x[i], v.x[i]);
    }
    store<n>(weight + d, w);
    store(s1 + d, m);
    store(s2 + d, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    embedding_update_exact(const Batch<ExactUpdate> batch, const Gradients gradients, int log2_lanes) {
  const Group group{log2_lanes};
  const int64_t i = int64_t(blockIdx.x) * group.per_block() + group.index();
  if (i >= gradients.n || !gradients.starts_run(i)) return;
  const int64_t key = gradients.key(i);
  const ExactUpdate& u = batch.items[find(batch, &ExactUpdate::first_key, key)];
  const int64_t row = key - u.first_key;
  if (row < 0 || row >= u.R) return;
  const T* grad = static_cast<const T*>(gradients.values) + i * gradients.stride;
  if (u.packed)
    update_exact_row<T, kStatePack<T>>(u, row, grad, group);
  else
    update_exact_row<T, 1>(u, row, grad, group);
}

}  // namespace cuda
}  // namespace rk
