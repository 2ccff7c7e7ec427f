// The arguments of an optimizer's step on tables, as the CPU and the CUDA implementation take them.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>

#include "embedding/features.h"
#include "embedding/params.h"

#define RK_CHECK_UPDATE(condition, ...) RK_CHECK(condition, "embedding_bag_update: ", __VA_ARGS__)

namespace rk {

// A table's hyper: lr, beta1, beta2, eps, weight_decay, number of the step, grad_factor, max_norm, rounding,
// then what the optimizer has of its own.
constexpr size_t kHyper = 9;
inline size_t hyper_of(int64_t optimizer) { return kHyper + kRules[optimizer].settings; }

inline size_t states_of(int64_t optimizer) {
  return kRules[optimizer].elementwise + kRules[optimizer].row_wise;
}

inline void check_optimizer(const char* op, int64_t optimizer, size_t tables, size_t states, size_t hyper) {
  RK_CHECK(optimizer >= 0 && optimizer < int64_t(std::size(kRules)), op, ": unknown optimizer ", optimizer);
  RK_CHECK(states == tables * states_of(optimizer), op, ": states must hold ", states_of(optimizer),
           " tensors a table, got ", states, " for ", tables);
  RK_CHECK(hyper == hyper_of(optimizer) * tables, op, ": hyper must hold ", hyper_of(optimizer),
           " numbers a table, got ", hyper, " for ", tables);
}

// Raises unless `rows` and `values` have the form of a coalesced sparse gradient of the table.
inline void check_sparse(const Tensor& weight, const Tensor& rows, const Tensor& values) {
  RK_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && values.dim() == 2 &&
               values.size(0) == rows.size(0) && values.size(1) == weight.size(1) &&
               values.scalar_type() == weight.scalar_type(),
           "sparse_update: rows must be int64 [n] and values [n, D] like the table of shape ",
           shape_of(weight), " and ", name_of(weight.scalar_type()), ", got shapes ", shape_of(rows), " and ",
           shape_of(values), ", ", name_of(rows.scalar_type()), " and ", name_of(values.scalar_type()));
}

// Whether two tables have an element in common; the columns of one matrix may be several tables.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const char *first = static_cast<const char*>(a.const_data_ptr()),
             *second = static_cast<const char*>(b.const_data_ptr());
  const int64_t size = a.element_size(), size_b = b.element_size();
  const int64_t apart = (second - first) / size;  // a comes first
  if (second >= first + ((a.size(0) - 1) * a.stride(0) + a.size(1)) * size) return false;
  const bool one_matrix =
      a.stride(0) > 0 && a.stride(0) == b.stride(0) && size_b == size && (second - first) % size == 0;
  return !one_matrix || apart % a.stride(0) < a.size(1) || apart % a.stride(0) + b.size(1) > a.stride(0);
}

// Raises if two tables share memory: threads would step on both at once.
inline void check_apart(const Tensors& weights) {
  std::vector<size_t> order;
  for (size_t t = 0; t < weights.size(); ++t)
    if (weights[t].numel() > 0) order.push_back(t);
  const auto start = [&](size_t t) { return static_cast<const char*>(weights[t].const_data_ptr()); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return start(a) < start(b); });
  for (size_t i = 0; i < order.size(); ++i) {
    const Tensor& w = weights[order[i]];
    const char* end = start(order[i]) + ((w.size(0) - 1) * w.stride(0) + w.size(1)) * w.element_size();
    for (size_t k = i + 1; k < order.size() && start(order[k]) < end; ++k)
      RK_CHECK_UPDATE(!overlap(w, weights[order[k]]), "weights[", std::min(order[i], order[k]),
                      "] and weights[", std::max(order[i], order[k]),
                      "] share memory: give a table once, and its features its number");
  }
}

// What follows from the settings and the number of the step alone, and the optimizer's own.
template <class Update>
void fold_settings(Update& u, int64_t optimizer, const double* hyper) {
  const double count = hyper[5], *own = hyper + kHyper;
  u.step = u.lr, u.inverse_root = 1;
  if (optimizer == kAdam || optimizer == kAdamW || optimizer == kRowWiseAdam) {
    const double correction1 = 1 - std::pow(u.beta1, count), correction2 = 1 - std::pow(u.beta2, count);
    u.step = optimizer == kAdam ? u.lr * std::sqrt(correction2) / correction1 : u.lr / correction1;
    u.inverse_root = optimizer == kAdam ? 1 : 1 / std::sqrt(correction2);
  }
  if (optimizer == kFTRL) u.own[0] = -own[0], u.eps = own[1], u.own[1] = own[2], u.weight_decay = own[3];
  if (optimizer == kRowWiseRMSprop) u.weight_decay = own[0], u.own[0] = 1 - own[1], u.own[1] = count;
}

// How a table of 16 bits is rounded in a step: with Philox's key, 0: to the nearest, and the step's number.
struct Rounding {
  uint64_t key;
  uint32_t count;
};

inline Rounding rounding_of(const char* op, const double* hyper) {
  const double count = hyper[5], key = hyper[8];
  RK_CHECK(key >= 0 && key < 0x1p53 && key == std::floor(key), op,
           ": rounding must be 0 or an integer below 2^53, got ", key);
  if (key == 0) return {};
  RK_CHECK(count >= 0 && count < 0x1p32 && count == std::floor(count), op,
           ": where rounding is not 0, step must be an integer below 2^32, got ", count);
  return {static_cast<uint64_t>(key), static_cast<uint32_t>(count)};
}

// The step of `op` on a table, checked. `Update` is the CPU's or CUDA's struct; the caller fills in the rest
// of it.
template <class Update>
Update make_update(const char* op, int64_t optimizer, const double* hyper, const Tensor& weight,
                   const Tensor* states) {
  RK_CHECK(is_floating(weight.scalar_type()), op,
           ": a table must be float32, float64, float16 or bfloat16, got ", name_of(weight.scalar_type()));
  const bool is_matrix = weight.dim() == 2;
  RK_CHECK(is_matrix && (weight.stride(1) == 1 || weight.size(1) <= 1) &&
               (weight.stride(0) >= weight.size(1) || weight.size(0) <= 1),
           op, ": a table must be [R, D] with elements side by side in rows that do not overlap, got shape ",
           shape_of(weight),
           is_matrix ? " and strides [" + std::to_string(weight.stride(0)) + ", " +
                           std::to_string(weight.stride(1)) + "]"
                     : "");
  Update u{};
  u.weight = weight.data_ptr();
  u.stride_wr = weight.stride(0);
  u.lr = hyper[0], u.beta1 = hyper[1], u.beta2 = hyper[2], u.eps = hyper[3], u.weight_decay = hyper[4];
  u.grad_factor = hyper[6], u.max_norm = hyper[7];
  fold_settings(u, optimizer, hyper);
  const ScalarType dtype = accumulator_dtype(weight.scalar_type());
  const int64_t R = weight.size(0);
  for (size_t i = 0; i < states_of(optimizer); ++i) {
    const Tensor& state = states[i];
    const bool one_a_row = i >= size_t(kRules[optimizer].elementwise);
    const int64_t D = one_a_row ? 1 : weight.size(1);
    const bool fits = state.scalar_type() == dtype && state.dim() == (one_a_row ? 1 : 2) &&
                      state.size(0) == R && (one_a_row || state.size(1) == D);
    const bool rows_fit =
        fits && (R <= 1 || (one_a_row ? state.stride(0) == 1
                                      : state.stride(0) >= D && state.stride(0) == states[0].stride(0)));
    RK_CHECK(rows_fit && (D <= 1 || state.stride(1) == 1), op, ": state ", i, " of a table of shape ",
             shape_of(weight), " must be ", name_of(dtype), " of one value ",
             one_a_row ? "a row, contiguous" : "an element, in rows as far apart as state 0's",
             ", got shape ", shape_of(state), " and ", name_of(state.scalar_type()));
    u.state[i] = state.data_ptr();
    if (!one_a_row) u.stride_sr = state.stride(0);
  }
  return u;
}

}  // namespace rk
