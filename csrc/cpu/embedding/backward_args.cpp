#include "cpu/embedding/backward_args.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"
#include "cpu/simd/non_temporal.h"
#include "cpu/tuning.h"

namespace rk {

BackwardArgs::BackwardArgs(const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows,
                           const FeatureArgs& args)
    : args(args),
      features(args, rows.size()),
      rows(rows),
      outs(grad_outs, weights, rows, args, [&](size_t f) { return features.bags[f].B; }) {
  const size_t n = args.size();
  grads.assign(n, outs.some);
  for (const Tensor& w : weights) tables.push_back(unit_stride_rows(w));
  for (size_t f = 0; f < n; ++f) {
    Bags& bag = features.bags[f];
    const int64_t t = args.tables[f];
    bag.R = rows[t];
    if (outs.need_values) {
      bag.weight = tables[t].const_data_ptr();
      bag.stride_wr = tables[t].stride(0);
    }
    if (!grad_outs[f]) {
      bag.B = 0;  // adds nothing
      continue;
    }
    const Tensor& grad = grads[f] = unit_stride_rows(*grad_outs[f]);
    bag.D = outs.widths[t];
    bag.out = const_cast<void*>(grad.const_data_ptr());
    bag.stride_ob = grad.dim() == 2 ? grad.stride(0) : bag.D;
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
