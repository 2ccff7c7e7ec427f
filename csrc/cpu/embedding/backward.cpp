// The embedding op's backwards: dense gradients, coalesced sparse ones, or an optimizer's step on the rows.
// How rows are summed is in sorted_lookups.h, the mathematics in segment_sum_kernel.h and
// optimizer_kernel.h.
#include "cpu/embedding/backward.h"

#include <tuple>

#include "cpu/embedding/sorted_lookups.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/radix_sort.h"
#include "cpu/tuning.h"
#include "embedding/optimizer.h"

namespace rk {

static std::tuple<Tensors, Tensors> embedding_bag_backward_cpu(
    const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows, const Tensors& indices,
    const Tensors& offsets, const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
    const Ints& padding_idx, const Ints& frozen_rows, const Ints& known) {
  const BackwardArgs backward(
      grad_outs, weights, rows,
      {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, nullptr});
  const SortedLookups lookups(backward);
  Tensors grad_weights;
  std::vector<TableGrad> sums(rows.size(), TableGrad{});
  for (size_t t = 0; t < rows.size(); ++t) {
    grad_weights.push_back(backward.outs.of_table[t] ? new_empty_paged(*backward.outs.of_table[t],
                                                                       {rows[t], backward.outs.widths[t]})
                                                     : torch::stable::new_empty(backward.outs.some, {0}));
    sums[t].grad_weight = grad_weights[t].data_ptr();
  }
  zero(grad_weights);
  lookups.reduce(sums, backward.outs.dtypes(), backward.outs.widths);
  return {grad_weights, backward.factor_grads()};
}

std::tuple<Tensors, Tensors, Tensors> sparse_gradients(const BackwardArgs& backward,
                                                       const std::vector<FmPart>& fm) {
  SortedLookups lookups(backward);
  const Ints counts = lookups.count_rows();
  Tensors grad_rows, values;
  std::vector<TableGrad> sums(counts.size(), TableGrad{});
  for (size_t t = 0; t < counts.size(); ++t) {
    grad_rows.push_back(torch::stable::new_empty(backward.outs.some, {counts[t]}, ScalarType::Long));
    values.push_back(
        new_empty_paged(backward.outs.of_table[t] ? *backward.outs.of_table[t] : backward.outs.some,
                        {counts[t], backward.outs.widths[t]}));
    sums[t].rows = static_cast<int64_t*>(grad_rows[t].mutable_data_ptr());
    sums[t].grad_weight = values[t].mutable_data_ptr();
    sums[t].fm = fm.empty() ? nullptr : &fm[t];
  }
  lookups.reduce(sums, backward.outs.dtypes(), backward.outs.widths);
  return {grad_rows, values, backward.factor_grads()};
}

static std::tuple<Tensors, Tensors, Tensors> embedding_bag_backward_sparse_cpu(
    const OptionalTensors& grad_outs, const Tensors& weights, const Ints& rows, const Tensors& indices,
    const Tensors& offsets, const Tensors& per_sample_weights, const Ints& tables, const Ints& modes,
    const Ints& padding_idx, const Ints& frozen_rows, const Ints& known) {
  return sparse_gradients(BackwardArgs(
      grad_outs, weights, rows,
      {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, nullptr}));
}

static Update make_cpu_update(const char* op, int64_t optimizer, const double* hyper, const Tensor& weight,
                              const Tensor* states) {
  auto u = make_update<Update>(op, optimizer, hyper, weight, states);
  u.optimizer = static_cast<Optimizer>(optimizer);
  u.count = hyper[5], u.rounding = rounding_of(op, hyper).key;
  return u;
}

Tensors update_tables(const BackwardArgs& backward, const Tensors& weights, const Tensors& states,
                      int64_t optimizer, const std::vector<double>& hyper, const std::vector<FmPart>& fm,
                      const CatchUp* idle) {
  check_optimizer("embedding_bag_update", optimizer, weights.size(), states.size(), hyper.size());
  std::vector<Update> updates;
  std::vector<TableGrad> sums(weights.size(), TableGrad{});
  for (size_t t = 0; t < weights.size(); ++t) {
    updates.push_back(make_cpu_update("embedding_bag_update", optimizer,
                                      hyper.data() + hyper_of(optimizer) * t, weights[t],
                                      states.data() + t * states_of(optimizer)));
    updates[t].idle = idle ? idle + t : nullptr;
  }
  check_apart(weights);
  for (size_t t = 0; t < weights.size(); ++t) {
    sums[t].update = &updates[t];
    sums[t].fm = fm.empty() ? nullptr : &fm[t];
  }
  const SortedLookups lookups(backward);
  Tensors grad_factors = backward.factor_grads();
  lookups.reduce(sums, backward.outs.dtypes(), backward.outs.widths);
  return grad_factors;
}

static Tensors embedding_bag_update_cpu(const OptionalTensors& grad_outs, const Tensors& weights,
                                        const Tensors& states, const Tensors& indices, const Tensors& offsets,
                                        const Tensors& per_sample_weights, const Ints& tables,
                                        const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows,
                                        const Ints& known, int64_t optimizer,
                                        const std::vector<double>& hyper) {
  const Ints rows = rows_of(weights);
  const BackwardArgs backward(
      grad_outs, weights, rows,
      {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, nullptr});
  return update_tables(backward, weights, states, optimizer, hyper);
}

// A step on the rows of a coalesced sparse gradient.
static void sparse_update_cpu(const Tensor& weight, const Tensors& states, const Tensor& rows,
                              const Tensor& values, int64_t optimizer, const std::vector<double>& hyper) {
  check_optimizer("sparse_update", optimizer, 1, states.size(), hyper.size());
  const Update u = make_cpu_update("sparse_update", optimizer, hyper.data(), weight, states.data());
  check_sparse(weight, rows, values);
  const int64_t n = rows.size(0), D = weight.size(1);
  const Tensor row = torch::stable::contiguous(rows), value = torch::stable::contiguous(values);
  const int64_t* rp = static_cast<const int64_t*>(row.const_data_ptr());
  for (int64_t i = 0; i < n; ++i)
    RK_CHECK(rp[i] >= 0 && rp[i] < weight.size(0) && (i == 0 || rp[i - 1] < rp[i]), "sparse_update: rows[", i,
             "] = ", rp[i], " must ascend in a table with ", weight.size(0), " rows");
  dispatch_floating(weight.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const SparseStep<T> step{u, rp, static_cast<const T*>(value.const_data_ptr()), D};
    run_tasks((n + kSparseStepRows - 1) / kSparseStepRows, n * (D + kLookupOverhead), [&](int64_t task) {
      auto scratch = uninitialized<Accumulator<T>>(chunk_of(D) * D);
      RK_DISPATCH_ISA(embedding_optimizer_step<T>, step,
                      {task * kSparseStepRows, std::min(n, (task + 1) * kSparseStepRows)}, scratch.get());
    });
  });
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_bag_backward", TORCH_BOX(&rk::embedding_bag_backward_cpu));
  m.impl("embedding_bag_backward_sparse", TORCH_BOX(&rk::embedding_bag_backward_sparse_cpu));
  m.impl("embedding_bag_update", TORCH_BOX(&rk::embedding_bag_update_cpu));
  m.impl("sparse_update", TORCH_BOX(&rk::sparse_update_cpu));
}
