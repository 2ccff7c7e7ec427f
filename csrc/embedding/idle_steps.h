// What dense Adam's idle steps come to, for the kernels of both devices: a table's clock and the history of
// its steps. The mathematics is in cpu/embedding/catch_up_kernel.h.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#  define RK_ON_BOTH __host__ __device__ inline
#else
#  define RK_ON_BOTH inline __attribute__((always_inline))
#endif

namespace rk {

// What the steps after step t = base + i do, up to the last one. Row i of the history [S, 20] of doubles; the
// powers are the betas' to i.
constexpr int kAdamTerms = 16;
struct AdamStart {
  double centre, decay, term[kAdamTerms], power1, power2;

  // How many terms count for sums in so many bytes a value: 4, 6, 8 or all.
  RK_ON_BOTH int terms(int bytes) const {
    const double least = term[0] * (bytes == 4 ? 1e-9 : 1e-17);
    return counts(8, kAdamTerms, least) ? kAdamTerms : counts(6, 8, least) ? 8 : counts(4, 6, least) ? 6 : 4;
  }

 private:
  RK_ON_BOTH bool counts(int from, int to, double least) const {
    bool counts = false;
    for (int j = from; j < to; ++j) counts |= !((term[j] < 0 ? -term[j] : term[j]) <= least);  // a NaN does
    return counts;
  }
};

// The steps that a table has taken up to now: `step` is the last one's number, `decay` the product of all
// (1 - lr weight_decay) after `base`. A row's last step is the one that it is as of, negative or zero if it
// never had a gradient.
struct StepClock {
  const AdamStart* history;
  int64_t step, base;
  double decay, eps;

  // Whether a row of this last step has steps to catch up with: one that never had a gradient only where rows
  // decay.
  RK_ON_BOTH bool is_idle(int32_t last) const { return last > 0 ? last < step : decay != 1 && -last < step; }
  // The last step of such a row once it has caught up.
  RK_ON_BOTH int32_t current(int32_t last) const { return static_cast<int32_t>(last > 0 ? step : -step); }
  RK_ON_BOTH const AdamStart& start_of(int32_t last) const {
    const int64_t t = last > 0 ? last : -last;
    return history[t > base ? t - base : 0];
  }
  // What w is multiplied with for the steps since then.
  RK_ON_BOTH double decay_since(const AdamStart& start) const { return decay == 1 ? 1 : decay / start.decay; }
  // The entry whose powers are the betas' to the number of those steps.
  RK_ON_BOTH const AdamStart& powers_since(int32_t last) const { return history[step - last]; }
};

// A step that is to be added to the history of a clock: `number` of rate lr; decay_before and decay_after are
// the product of all (1 - lr weight_decay) without and with its own.
struct HistoryStep {
  AdamStart* history;
  int64_t base, number;
  double beta1, beta2, lr, decay_before, decay_after;
  // What the host makes of these.
  int64_t n;  // entries that it adds to, those before it; steps about `delay` after theirs count the most
  double log_beta2, delay, corrected, root2;

  // The entry before it, which is new, as long as nothing has been added. `Math` has the device's functions.
  template <class Math>
  RK_ON_BOTH void begin(const Math& math) const {
    AdamStart& start = history[number - 1 - base];
    const double t = static_cast<double>(number - 1);
    start.centre = math.sqrt(math.exp(delay * log_beta2) / -math.expm1((t + delay) * log_beta2));
    start.decay = decay_before;
    for (int j = 0; j < kAdamTerms; ++j) start.term[j] = 0;
  }
  // The k-th entry before it.
  template <class Math>
  RK_ON_BOTH void add(int64_t k, const Math& math) const {
    AdamStart& start = history[number - k - base];
    const AdamStart& powers = history[k];
    const double r = math.sqrt(math.sqrt(powers.power2) / (root2 * start.centre)), tau = (1 - r) / (1 + r);
    double term = corrected * powers.power1 / r;
    start.term[0] += term;
    term *= 2;
    for (int j = 1; j < kAdamTerms; ++j) start.term[j] += term *= tau;
  }
};

}  // namespace rk
