// Lookup + FM + linear term in one pass: threads and registration. The mathematics are in fm_kernel.h and,
// of the lookups, lookup_kernel.h.
#include "embedding/fm.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/dense/params.h"
#include "cpu/embedding/backward.h"
#include "cpu/embedding/lookup.h"
#include "cpu/embedding/params.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/radix_sort.h"
#include "cpu/tuning.h"

namespace rk {
namespace {

// The FM and the linear term of samples. With `rows` the features are rows as they are, and are looked up
// too; without, they have been.
template <class T>
void combine(const ForwardArgs& forward, bool rows, const T* linear_weight, T* fm, T* linear, Range samples) {
  const std::vector<Bags>& bags = forward.features.bags;
  const int64_t F = bags.size(), D = bags[0].D;
  if (rows) {
    FmRows<T> k{};
    k.features = bags.data();
    k.F = F;
    k.linear_weight = linear_weight;
    k.fm = fm;
    k.linear = linear;
    return RK_DISPATCH_ISA(embedding_fm_rows<T>, k, samples);
  }
  FmInteraction<T> k{};
  k.x = static_cast<const T*>(forward.outs[0].const_data_ptr());
  k.stride_sample = bags[0].stride_ob;
  k.stride_field = D;
  k.out = fm;
  k.F = F;
  k.D = D;
  k.reduce_sum = true;
  RK_DISPATCH_ISA(fm_interaction<T>, k, samples);
  if (!linear_weight) return;
  Linear<T> dot{};
  dot.x = k.x;
  dot.stride_row = k.stride_sample;
  dot.weight = linear_weight;
  dot.n = F * D;
  dot.out = linear;
  RK_DISPATCH_ISA(linear<T>, dot, samples);
}

// Copies the dense columns behind the embeddings.
template <class T>
void copy_dense(const Tensor& dense, const Tensor& embeddings, Range samples) {
  const int64_t columns = dense.size(1), stride_x = embeddings.size(1), stride_row = dense.stride(0),
                stride_column = dense.stride(1);
  const T* from = static_cast<const T*>(dense.const_data_ptr());
  T* x = static_cast<T*>(embeddings.mutable_data_ptr()) + stride_x - columns;
  for (int64_t b = samples.begin; b < samples.end; ++b)
    for (int64_t n = 0; n < columns; ++n) x[b * stride_x + n] = from[b * stride_row + n * stride_column];
}

// Block by block of samples: all features are looked up, then combined while their rows are in L2.
std::tuple<Tensor, Tensor, Tensor> embedding_fm_cpu(
    const Tensors& weights, const Tensors& indices, const Tensors& offsets, const Tensors& per_sample_weights,
    const Ints& tables, const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows,
    const Ints& known, const Names& names, const OptionalTensor& linear_weight, const OptionalTensor& dense,
    bool /* sparse: how the backward is to be */) {
  const int64_t extra_columns = dense && dense->dim() == 2 ? dense->size(1) : 0;
  const ForwardArgs forward(
      weights, {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, known, &names},
      true, extra_columns);
  const std::vector<Bags>& bags = forward.features.bags;
  const int64_t F = bags.size(), D = bags[0].D, B = bags[0].B, width = F * D;
  for (int64_t f = 0; f < F; ++f)
    RK_CHECK(bags[f].D == D, "embedding_fm: features must have one width, but that of ", forward.args.name(f),
             " is ", bags[f].D, " and that of ", forward.args.name(0), " ", D);
  const Tensor& embeddings = forward.outs[0];
  Tensor fm = torch::stable::new_empty(embeddings, {B, 1});
  // Without columns there is no pointer to the linear weights, and null means no linear term to the kernels.
  const std::vector<int64_t> linear_shape{linear_weight ? B : 0, 1};
  Tensor linear = width == 0 ? torch::stable::new_zeros(embeddings, linear_shape)
                             : torch::stable::new_empty(embeddings, linear_shape);
  const Tensor a =
      linear_weight ? linear_weight_of("embedding_fm", *linear_weight, embeddings, width) : linear;
  if (dense) check_dense("embedding_fm", *dense, embeddings, B);

  int64_t work = 0;
  for (const Bags& bag : bags) work += lookup_work(bag);
  const bool rows = std::all_of(bags.begin(), bags.end(), [&](const Bags& bag) {
    return bag.are_rows() && bag.wide_ids == bags[0].wide_ids;
  });
  const int64_t block = std::clamp<int64_t>(kFmBlockBytes / (width * embeddings.element_size() + 1),
                                            kFmMinSamples, kFmMaxSamples);
  std::atomic<bool> in_range{true};
  run_tasks((B + block - 1) / block, work, [&](int64_t task) {
    const int64_t b0 = task * block, b1 = std::min(B, b0 + block);
    for (int64_t f = 0; f < F; ++f)
      if (!(rows ? ids_in_range(bags[f], b0, b1) : forward.look_up(f, b0, b1))) {
        in_range = false;
        return;
      }
    dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      combine<T>(forward, rows, linear_weight ? static_cast<const T*>(a.const_data_ptr()) : nullptr,
                 static_cast<T*>(fm.mutable_data_ptr()), static_cast<T*>(linear.mutable_data_ptr()),
                 {b0, b1});
      if (extra_columns > 0) copy_dense<T>(*dense, embeddings, {b0, b1});
    });
  });
  if (!in_range) forward.check_range();
  return {embeddings, fm, linear};
}

// What the kernels of the backward are given, without their outputs.
FmGrads grads_of(const FmBackwardArgs& args, int64_t D) {
  FmGrads grads{};
  grads.embeddings = args.embeddings.const_data_ptr();
  grads.grad_embeddings = data_of(args.grad_embeddings);
  grads.grad_fm = data_of(args.grad_fm);
  grads.grad_linear = data_of(args.grad_linear);
  grads.linear_weight = data_of(args.linear_weight);
  grads.stride_xb = args.embeddings.stride(0);
  grads.stride_gb = row_stride_of(args.grad_embeddings);
  grads.F = args.F;
  grads.D = D;
  return grads;
}

// Calls kernel(samples, their part of grad_a) on blocks of samples, and adds the parts up:
// -> the gradient of the linear weights, [0] where there are none.
template <class T, class Kernel>
Tensor in_blocks(const FmBackwardArgs& args, const OptionalTensor& linear_weight, int64_t work,
                 const Kernel& kernel) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = 256;  // samples; a constant, because the order of grad_a's sums follows from it
  const int64_t B = args.B, blocks = (B + kBlock - 1) / kBlock;
  const int64_t partials = args.linear_weight ? args.width : 0;
  const Tensor grad_a = linear_weight ? torch::stable::new_zeros(*linear_weight, linear_weight->sizes())
                                      : torch::stable::new_empty(args.embeddings, {0});
  const auto sums = uninitialized<A>(blocks * partials);
  run_tasks(blocks, work, [&](int64_t i) {
    A* sum = sums.get() + i * partials;
    std::fill_n(sum, partials, A(0));
    kernel(Range{i * kBlock, std::min(B, (i + 1) * kBlock)}, sum);
  });
  SumParts<T> parts{};
  parts.sums = sums.get();
  parts.parts = blocks;
  parts.n = partials;
  parts.total = static_cast<T*>(grad_a.mutable_data_ptr());
  RK_DISPATCH_ISA(embedding_fm_sum<T>, parts);
  return grad_a;
}

// -> the gradient of the lookups [B, F D] and of the linear weights, [0] where there are none.
std::tuple<Tensor, Tensor> embedding_fm_backward_cpu(const OptionalTensor& grad_embeddings,
                                                     const OptionalTensor& grad_fm,
                                                     const OptionalTensor& grad_linear,
                                                     const Tensor& embeddings,
                                                     const OptionalTensor& linear_weight, int64_t D) {
  RK_CHECK_CPU("embedding_fm_backward", embeddings);
  const FmBackwardArgs args(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D);
  Tensor grad_lookups = new_empty_paged(embeddings, {args.B, args.width});
  Tensor grad_a = grad_lookups;
  FmGrads grads = grads_of(args, D);
  grads.grad_lookups = grad_lookups.mutable_data_ptr();
  dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    grad_a =
        in_blocks<T>(args, linear_weight, 3 * args.B * args.width, [&](Range samples, Accumulator<T>* sum) {
          RK_DISPATCH_ISA(embedding_fm_backward<T>, grads, samples, sum);
        });
  });
  return {grad_lookups, grad_a};
}

// Per-feature output gradients for the embedding backward: either complete, or only the deep part's, with the
// FM's and the linear term's contributions added inside the kernel.
struct LookupGrads {
  OptionalTensors outs;
  std::vector<FmPart> fm;  // of each table, or empty
  Tensor grad_linear_weight;

  // `unchanged`: the tables hold what was looked up.
  LookupGrads(const OptionalTensor& grad_embeddings, const OptionalTensor& grad_fm,
              const OptionalTensor& grad_linear, const Tensor& embeddings,
              const OptionalTensor& linear_weight, int64_t D, const Tensors& weights, bool unchanged,
              const FeatureArgs& features)
      : grad_linear_weight(embeddings) {
    RK_CHECK_CPU("embedding_fm_backward", embeddings);
    check_lengths(features, weights.size());
    const int64_t columns = embeddings.dim() == 2 ? embeddings.size(1) : -1, F = features.size();
    RK_CHECK(D >= 0 && D <= columns && F * D == columns,
             "embedding_fm_backward: embeddings must be [B, F * dim] of ", features.size(),
             " features with dim = ", D, ", got shape ", shape_of(embeddings));
    if (!unchanged || !is_rows(weights, embeddings, D, features)) {
      Tensor grad = embeddings;
      std::tie(grad, grad_linear_weight) =
          embedding_fm_backward_cpu(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D);
      for (int64_t f = 0; f < F; ++f) outs.push_back(torch::stable::narrow(grad, 1, f * D, D));
      return;
    }
    add_in_backward(FmBackwardArgs(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D),
                    linear_weight, D, weights, features);
  }

 private:
  // Leaves the FM's and the linear term's part to the backward of the lookups.
  void add_in_backward(FmBackwardArgs args, const OptionalTensor& linear_weight, int64_t D,
                       const Tensors& weights, const FeatureArgs& features) {
    const Tensor& embeddings = args.embeddings;
    const int64_t B = args.B, F = features.size();
    const auto zeros = [&](int64_t rows, int64_t columns) {
      return torch::stable::new_zeros(embeddings, {rows, columns});
    };
    if (!args.grad_fm) args.grad_fm = zeros(B, 1);
    const Tensor nothing = args.grad_embeddings ? embeddings : zeros(B, D);
    const Tensor grad_l = args.grad_linear ? *args.grad_linear : zeros(B, 1);
    const Tensor a = args.linear_weight ? *args.linear_weight : zeros(F, D);
    Tensor grad_fm_s =
        torch::stable::new_empty(embeddings, {B, D}, accumulator_dtype(embeddings.scalar_type()));
    keepalive = {*args.grad_fm, grad_l, a, grad_fm_s};
    fm.resize(weights.size());
    for (int64_t f = 0; f < F; ++f) {
      outs.push_back(args.grad_embeddings ? torch::stable::narrow(*args.grad_embeddings, 1, f * D, D)
                                          : nothing);
      keepalive.push_back(unit_stride_rows(weights[features.tables[f]]));
      const Tensor& w = keepalive.back();
      FmPart& part = fm[features.tables[f]];
      part.grad_fm_s = grad_fm_s.const_data_ptr();
      part.grad_fm = args.grad_fm->const_data_ptr();
      part.grad_linear = grad_l.const_data_ptr();
      part.weight = w.const_data_ptr();
      part.linear_weight = static_cast<const char*>(a.const_data_ptr()) + f * D * a.element_size();
      part.stride_wr = w.stride(0);
    }
    FmGrads grads = grads_of(args, D);
    grads.grad_fm_s = grad_fm_s.mutable_data_ptr();
    dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      grad_linear_weight =
          in_blocks<T>(args, linear_weight, B * args.width, [&](Range samples, Accumulator<T>* sum) {
            RK_DISPATCH_ISA(embedding_fm_sums<T>, grads, samples, sum);
          });
    });
  }

  Tensors keepalive;  // of what `fm` points into

  // Whether every embedding is a row of a table that is its feature's alone. Edits through .data, which no
  // version counts, are looked for in one row of each.
  static bool is_rows(const Tensors& weights, const Tensor& embeddings, int64_t D,
                      const FeatureArgs& features) {
    std::vector<const void*> tables;
    for (size_t f = 0; f < features.size(); ++f) {
      const int64_t t = features.tables[f];
      if (features.modes[f] != kNone || features.indices[f].dim() != 1 || features.has_factors(f) || t < 0 ||
          t >= static_cast<int64_t>(weights.size()))
        return false;
      const Tensor& w = weights[t];
      if (w.dim() != 2 || w.size(1) != D || w.scalar_type() != embeddings.scalar_type()) return false;
      if (w.numel()) tables.push_back(w.const_data_ptr());
      if (embeddings.size(0) > 0 && !holds(w, embeddings, f, D, features)) return false;
    }
    std::sort(tables.begin(), tables.end());
    return std::adjacent_find(tables.begin(), tables.end()) == tables.end();
  }

  // Whether w still holds what feature f looked up for one of the samples, a different one for each feature.
  static bool holds(const Tensor& w, const Tensor& embeddings, int64_t f, int64_t D,
                    const FeatureArgs& features) {
    const Tensor& ids = features.indices[f];
    const bool wide = ids.scalar_type() == ScalarType::Long;
    if ((!wide && ids.scalar_type() != ScalarType::Int) || !ids.is_cpu() || !w.is_cpu() ||
        ids.size(0) != embeddings.size(0) || embeddings.size(1) < (f + 1) * D)
      return false;
    const int64_t b = f * 257 % ids.size(0), place = b * ids.stride(0);
    const int64_t id =
        features.known_of(f).row_of(wide ? static_cast<const int64_t*>(ids.const_data_ptr())[place]
                                         : static_cast<const int32_t*>(ids.const_data_ptr())[place]);
    if (id < 0 || id >= w.size(0)) return false;
    const int64_t size = w.element_size();
    const char* row = static_cast<const char*>(w.const_data_ptr()) + id * w.stride(0) * size;
    const char* x = static_cast<const char*>(embeddings.const_data_ptr()) +
                    (b * embeddings.stride(0) + f * D * embeddings.stride(1)) * size;
    for (int64_t d = 0; d < D; ++d)
      if (std::memcmp(row + d * w.stride(1) * size, x + d * embeddings.stride(1) * size, size) != 0)
        return false;
    return true;
  }
};

// embedding_fm_backward and then embedding_bag_backward_sparse.
std::tuple<Tensors, Tensors, Tensors, Tensor> embedding_fm_backward_sparse_cpu(
    const OptionalTensor& grad_embeddings, const OptionalTensor& grad_fm, const OptionalTensor& grad_linear,
    const Tensor& embeddings, const OptionalTensor& linear_weight, int64_t D, const Tensors& weights,
    bool unchanged, const Ints& rows, const Tensors& indices, const Tensors& offsets,
    const Tensors& per_sample_weights, const Ints& tables, const Ints& modes, const Ints& padding_idx,
    const Ints& frozen_rows, const Ints& known) {
  const FeatureArgs features{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                             known,   nullptr};
  for (size_t t = 0; t < weights.size() && weights.size() == rows.size(); ++t)
    RK_CHECK(weights[t].dim() == 2 && weights[t].size(0) == rows[t], "embedding_fm_backward: weights[", t,
             "] must be the table that was looked up, with ", rows[t], " rows, got shape ",
             shape_of(weights[t]));
  const LookupGrads grads(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D, weights,
                          unchanged, features);
  auto [grad_rows, values, factors] =
      sparse_gradients(BackwardArgs(grads.outs, weights, rows, features), grads.fm);
  return {grad_rows, values, factors, grads.grad_linear_weight};
}

// embedding_fm_backward and then embedding_bag_update.
std::tuple<Tensors, Tensor> embedding_fm_update_cpu(
    const OptionalTensor& grad_embeddings, const OptionalTensor& grad_fm, const OptionalTensor& grad_linear,
    const Tensor& embeddings, const OptionalTensor& linear_weight, int64_t D, const Tensors& weights,
    bool unchanged, const Tensors& states, const Tensors& indices, const Tensors& offsets,
    const Tensors& per_sample_weights, const Ints& tables, const Ints& modes, const Ints& padding_idx,
    const Ints& frozen_rows, const Ints& known, int64_t optimizer, const std::vector<double>& hyper) {
  const FeatureArgs features{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                             known,   nullptr};
  const LookupGrads grads(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D, weights,
                          unchanged, features);
  const Ints rows = rows_of(weights);
  const BackwardArgs backward(grads.outs, weights, rows, features);
  return {update_tables(backward, weights, states, optimizer, hyper, grads.fm), grads.grad_linear_weight};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_fm", TORCH_BOX(&rk::embedding_fm_cpu));
  m.impl("embedding_fm_backward", TORCH_BOX(&rk::embedding_fm_backward_cpu));
  m.impl("embedding_fm_backward_sparse", TORCH_BOX(&rk::embedding_fm_backward_sparse_cpu));
  m.impl("embedding_fm_update", TORCH_BOX(&rk::embedding_fm_update_cpu));
}
