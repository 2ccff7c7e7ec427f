#include "cpu/embedding/backward_args.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"
#include "cpu/simd/non_temporal.h"
#include "cpu/tuning.h"

namespace rk {

#define RK_CHECK_BACKWARD(condition, ...) RK_CHECK(condition, "embedding_bag_backward: ", __VA_ARGS__)

static const Tensor& first_of(const OptionalTensors& tensors) {
  const auto given = std::find_if(tensors.begin(), tensors.end(), [](const auto& t) { return bool(t); });
  RK_CHECK_BACKWARD(given != tensors.end(), "grad_outs has no gradient");
  return **given;
}

// Whether the gradient has the leading dimensions of what the feature's lookups gave.
static bool is_like_result(const Tensor& grad, const Bags& bag, const Tensor& ids) {
  if (bag.mode != kNone) return grad.dim() == 2 && grad.size(0) == bag.B;
  const auto shape = ids.sizes(), got = grad.sizes();
  return got.size() == shape.size() + 1 && std::equal(shape.begin(), shape.end(), got.begin());
}

static std::string shape_of_result(const Bags& bag, const Tensor& ids) {
  if (bag.mode != kNone) return "[" + std::to_string(bag.B) + ", D]";
  const std::string shape = shape_of(ids);
  return shape == "[]" ? "[D]" : shape.substr(0, shape.size() - 1) + ", D]";
}

BackwardArgs::BackwardArgs(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
                           const FeatureArgs& args)
    : args(args), features(args, rows.size()), rows(rows), some_grad(first_of(grad_outs)) {
  const size_t n = args.indices.size();
  RK_CHECK_BACKWARD(grad_outs.size() == n, "grad_outs must have one entry a feature, ", n, ", got ",
                    grad_outs.size());
  int64_t all_rows = 0;
  for (size_t t = 0; t < rows.size(); ++t) {
    RK_CHECK_BACKWARD(rows[t] >= 0 && rows[t] < kMostRows - all_rows, "rows[", t,
                      "] must be a table's number of rows, got ", rows[t]);
    all_rows += rows[t];
  }
  check_padding(args, [&](size_t t) { return rows[t]; });
  grads.assign(n, some_grad);
  widths.assign(rows.size(), 0);
  grad_of.assign(rows.size(), nullptr);
  bool need_values = false;
  for (size_t f = 0; f < n; ++f) {
    Bags& bag = features.bags[f];
    const int64_t t = args.tables[f];
    bag.R = rows[t];
    if (!grad_outs[f]) {
      bag.B = 0;  // adds nothing
      continue;
    }
    const Tensor& given = *grad_outs[f];
    RK_CHECK_BACKWARD(is_floating(given.scalar_type()), "grad_outs[", f,
                      "] must be float32, float64, float16 or bfloat16, got ", name_of(given.scalar_type()));
    RK_CHECK_BACKWARD(is_like_result(given, bag, args.indices[f]), "grad_outs[", f, "] must be ",
                      shape_of_result(bag, args.indices[f]), " like the result, got shape ", shape_of(given));
    const int64_t D = given.size(given.dim() - 1);
    RK_CHECK_BACKWARD(!grad_of[t] || (D == widths[t] && grad_of[t]->scalar_type() == given.scalar_type()),
                      "grad_outs[", f, "] must have the width and the dtype of the others of its table, ",
                      widths[t], " and ", name_of(grad_of[t]->scalar_type()), ", got shape ", shape_of(given),
                      " and ", name_of(given.scalar_type()));
    grads[f] = unit_stride_rows(given);
    const Tensor& grad = grads[f];
    widths[t] = bag.D = D;
    grad_of[t] = &grad;
    bag.out = const_cast<void*>(grad.const_data_ptr());
    bag.stride_ob = grad.dim() == 2 ? grad.stride(0) : D;
    features.check_factors(args, f, grad.scalar_type());
    need_values |= bag.mode == kMax || bag.per_sample_weights;
  }
  RK_CHECK_BACKWARD(weights.size() == rows.size() || (weights.empty() && !need_values),
                    "weights must have one entry a table, ", rows.size(), ", got ", weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor& w = weights[t];
    check_table("embedding_bag_backward", w, t);
    RK_CHECK_BACKWARD(w.size(0) == rows[t] && (!grad_of[t] || (w.size(1) == widths[t] &&
                                                               w.scalar_type() == grad_of[t]->scalar_type())),
                      "weights[", t, "] must have ", rows[t], " rows",
                      grad_of[t] ? " of the gradient's width and dtype, " + std::to_string(widths[t]) +
                                       " and " + name_of(grad_of[t]->scalar_type())
                                 : "",
                      ", got shape ", shape_of(w), " and ", name_of(w.scalar_type()));
    tables.push_back(unit_stride_rows(w));
  }
  for (size_t f = 0; f < n && need_values; ++f) {
    features.bags[f].weight = tables[args.tables[f]].const_data_ptr();
    features.bags[f].stride_wr = tables[args.tables[f]].stride(0);
  }
}

Tensors BackwardArgs::factor_grads() const {
  Tensors grad_factors;
  for (const Tensor& w : args.per_sample_weights)
    grad_factors.push_back(torch::stable::new_empty(w, w.sizes()));
  zero(grad_factors);
  const BagTasks plan(features);
  run_tasks(grad_factors.empty() ? 0 : plan.tasks.size(), plan.work, [&](int64_t task) {
    const auto [f, b0, b1] = plan.tasks[task];
    const Bags& bag = features.bags[f];
    if (!bag.per_sample_weights) return;
    dispatch_floating(grads[f].scalar_type(), [&, f = f, b0 = b0, b1 = b1](auto* type) {
      auto* grad_factor = static_cast<decltype(type)>(grad_factors[f].mutable_data_ptr());
      RK_DISPATCH_ISA(embedding_factor_grad, bag, {b0, b1}, grad_factor);
    });
  });
  return grad_factors;
}

void zero(const Tensors& tensors) {
  int64_t all_bytes = 0;
  std::vector<std::pair<char*, int64_t>> chunks;
  for (const Tensor& t : tensors) {
    char* begin = static_cast<char*>(t.data_ptr());
    const int64_t bytes = t.numel() * t.element_size();
    all_bytes += bytes;
    for (int64_t i = 0; i < bytes; i += kZeroBytes)
      chunks.emplace_back(begin + i, std::min(kZeroBytes, bytes - i));
  }
  run_tasks(chunks.size(), chunks.size() * kZeroBytes / 64, [&](int64_t i) {
    auto [p, bytes] = chunks[i];
    if (is_non_temporal(p, all_bytes)) {
      const int64_t rest = bytes % kCacheLine, lines = bytes - rest;
      RK_DISPATCH_ISA(zero_lines, p, lines);
      p += lines;
      bytes = rest;
    }
    std::memset(p, 0, bytes);
  });
}

}  // namespace rk
