// Idle steps of a row under dense Adam or AdamW, on a GPU.
//
// A row's w, m and v are as of step t; up to step T its gradients were zero. Then
//
//   w <- P w - m sum_n c_n T_n(z) / (g x + eps)      x = sqrt v,  z = (g x - eps) / (g x + eps)
//   m <- beta1^(T-t) m     v <- beta2^(T-t) v
//
// where g, the c_n and P follow from t alone: cpu/embedding/catch_up_kernel.h. The sum is Clenshaw's, over
// as many terms as count, 4 for most rows; they are read as it goes, the same for a row's lanes, and not kept
// in registers.
//
// Flops a value: 9 and 3 a term, one division and one square root.
#pragma once

#include "cuda/common/device.cuh"
#include "embedding/idle_steps.h"

namespace rk {
namespace cuda {

// A table under exact Adam.
struct CatchUp : StepClock {
  void* weight;  // [R, D], rows stride_wr apart
  int64_t stride_wr, R;
  void* state[2];  // [R, D], rows stride_sr apart
  int64_t stride_sr;
  int32_t* last_steps;  // [R]
  int32_t D;
  bool packed;  // rows of the table and of the state are packs
};

// Values of a row that a lane takes at a time: 16 bytes of the state, most of what is read.
template <class T>
constexpr int kStatePack = kPack<accumulate_t<T>>;

// What a row that is as of step `last` has to catch up with: nothing, with a decay of 1, if it is not idle.
template <class A>
struct Idle {
  const AdamStart* start;
  double decay_of_all;
  A decay = A(1), keep1 = A(1), keep2 = A(1), centre, eps;
  int terms = 0;

  __device__ Idle(const StepClock& clock, int32_t last) : start(&clock.start_of(last)), eps(A(clock.eps)) {
    if (!clock.is_idle(last)) return;
    decay = A(clock.decay_since(*start));
    if (last <= 0) return;  // it never had a gradient
    const AdamStart& powers = clock.powers_since(last);
    keep1 = A(powers.power1), keep2 = A(powers.power2);
    centre = A(start->centre), decay_of_all = clock.decay, terms = start->terms(sizeof(A));
  }

  // Brings columns of the row up to date. What follows sees w as it is stored.
  template <class T, int n>
  __device__ void take(Pack<T, n>& w, Pack<A, n>& m, Pack<A, n>& v) const {
    A inverse[n], z[n], b1[n] = {}, b2[n] = {};  // sum of c_n T_n(z) = b1 - z b2
    RK_UNROLL
    for (int i = 0; i < n; ++i) {
      const A gx = centre * sqrt(v.x[i]);
      inverse[i] = terms ? A(1) / (gx + eps) : A(0);
      z[i] = (gx - eps) * inverse[i];
    }
    for (int j = terms - 1; j >= 0; --j) {
      const A term = A(decay_of_all * start->term[j]);
      RK_UNROLL
      for (int i = 0; i < n; ++i) {
        const A b = (term - b2[i]) + (z[i] + z[i]) * b1[i];
        b2[i] = b1[i], b1[i] = b;
      }
    }
    RK_UNROLL
    for (int i = 0; i < n; ++i) {
      const A step = terms ? m.x[i] * ((b1[i] - z[i] * b2[i]) * inverse[i]) : A(0);
      narrow(w.x[i], decay * widen(w.x[i]) - step);
      m.x[i] *= keep1;
      v.x[i] *= keep2;
    }
  }
};

// A row's last step, read by one lane: another one may change it once all have it.
__device__ inline int32_t last_step_of(const int32_t* last_steps, int64_t row, Group group) {
  return group.sum(group.lane() == 0 ? last_steps[row] : 0);
}

}  // namespace cuda
}  // namespace rk
