// Tables under exact Adam from an op's lists, as the CPU and the CUDA implementation take them.
#pragma once

#include <cmath>
#include <vector>

#include "embedding/idle_steps.h"
#include "embedding/optimizer.h"

#define RK_CHECK_CATCH_UP(condition, ...) RK_CHECK(condition, "embedding_catch_up: ", __VA_ARGS__)

namespace rk {

// A table's clock in the lists: step, base, decay, eps.
constexpr size_t kClock = 4;

// `fits`: whether it is on the device.
inline void check_history(const char* op, const Tensor& history, bool fits) {
  constexpr int64_t kWidth = sizeof(AdamStart) / sizeof(double);
  RK_CHECK(fits && history.dim() == 2 && history.size(1) == kWidth &&
               history.scalar_type() == ScalarType::Double && history.is_contiguous(),
           op, ": a history must be float64 [S, ", kWidth, "], contiguous, got ",
           name_of(history.scalar_type()), " ", shape_of(history));
}

inline int32_t* last_steps_of(const char* op, const Tensor& last, int64_t R, bool fits) {
  RK_CHECK(fits && last.dim() == 1 && last.size(0) == R && last.scalar_type() == ScalarType::Int &&
               last.is_contiguous(),
           op, ": last_steps must be int32 [", R, "], contiguous, got ", name_of(last.scalar_type()), " ",
           shape_of(last));
  return static_cast<int32_t*>(last.mutable_data_ptr());
}

// Raises for lists that do not fit the tables; of each there are 2 states and a clock of 4 numbers. `CatchUp`
// is the CPU's or CUDA's struct, as is `Update`; fits(t, table) says whether t is where the table has to be.
template <class CatchUp, class Update, class Fits>
std::vector<CatchUp> make_catch_ups(const Tensors& weights, const Tensors& states, const Tensors& last_steps,
                                    const Tensors& histories, const std::vector<double>& clocks,
                                    const Fits& fits) {
  const size_t n = weights.size();
  RK_CHECK_CATCH_UP(
      states.size() == 2 * n && last_steps.size() == n && histories.size() == n &&
          clocks.size() == kClock * n,
      "of each table there must be 2 states, last_steps, a history and a clock of 4 numbers, got ",
      states.size(), ", ", last_steps.size(), ", ", histories.size(), " and ", clocks.size(), " for ", n);
  std::vector<CatchUp> all;
  for (size_t t = 0; t < n; ++t) {
    const double hyper[kHyper] = {0, 0, 0, 0, 0, 1, 1};  // what all optimizers have
    const Tensor& w = weights[t];
    const auto u = make_update<Update>("embedding_catch_up", kAdamW, hyper, w, states.data() + 2 * t);
    check_history("embedding_catch_up", histories[t], fits(histories[t], w));
    CatchUp c{};
    c.weight = u.weight, c.stride_wr = u.stride_wr, c.R = w.size(0);
    c.D = static_cast<decltype(c.D)>(w.size(1));
    c.state[0] = u.state[0], c.state[1] = u.state[1], c.stride_sr = u.stride_sr;
    c.last_steps = last_steps_of("embedding_catch_up", last_steps[t], c.R, fits(last_steps[t], w));
    c.history = static_cast<const AdamStart*>(histories[t].const_data_ptr());
    const double* clock = clocks.data() + kClock * t;
    c.step = static_cast<int64_t>(clock[0]), c.base = static_cast<int64_t>(clock[1]);
    c.decay = clock[2], c.eps = clock[3];
    RK_CHECK_CATCH_UP(0 <= c.base && c.base <= c.step && c.step - c.base < histories[t].size(0),
                      "the history of table ", t, " must reach from step ", c.base, " to ", c.step,
                      ", got shape ", shape_of(histories[t]));
    all.push_back(c);
  }
  return all;
}

inline HistoryStep make_history_step(const Tensor& history, bool fits, int64_t base, int64_t step,
                                     double beta1, double beta2, double lr, double decay_before,
                                     double decay_after) {
  check_history("adam_history", history, fits);
  RK_CHECK(0 <= base && base < step && step - base < history.size(0), "adam_history: step ", step,
           " must lie after base ", base, " and fit into a history of shape ", shape_of(history));
  HistoryStep s{static_cast<AdamStart*>(history.mutable_data_ptr()),
                base,
                step,
                beta1,
                beta2,
                lr,
                decay_before,
                decay_after,
                0,
                std::log(beta2),
                std::ceil(1 / (1 - beta1)),
                lr / (1 - std::pow(beta1, step)) / decay_after,
                0};
  s.root2 = std::sqrt(-std::expm1(step * s.log_beta2));
  // Nothing more comes of the steps before.
  const int64_t window = beta1 > 0 ? static_cast<int64_t>(std::ceil(std::log(1e-18) / std::log(beta1))) : 0;
  s.n = std::min(window, step - base);
  return s;
}

}  // namespace rk
