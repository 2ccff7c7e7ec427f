// Lookup + FM + linear term on a GPU: checks, launches, registration. The kernels and their mathematics are
// in fm.cuh.
#include <tuple>

#include "cuda/common/driver.h"
#include "cuda/embedding/fm.cuh"
#include "cuda/embedding/lookup.h"
#include "embedding/fm.h"

namespace rk {
namespace cuda {

static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

static int64_t blocks_of(int64_t B) { return blocks_for(B, 5); }  // a warp a sample

// The embeddings with the dense columns behind them: rows of a width that is no multiple of 16 bytes are
// written slower than they are copied afterwards.
static Tensor with_dense(const Tensor& embeddings, const OptionalTensor& dense) {
  if (!dense) return embeddings;
  const int64_t B = embeddings.size(0), width = embeddings.size(1);
  check_dense("embedding_fm", *dense, embeddings, B);
  Tensor all = torch::stable::new_empty(embeddings, {B, width + dense->size(1)});
  Tensor left = torch::stable::narrow(all, 1, 0, width);
  Tensor right = torch::stable::narrow(all, 1, width, dense->size(1));
  torch::stable::copy_(left, embeddings);
  torch::stable::copy_(right, *dense);
  return all;
}

static std::tuple<Tensor, Tensor, Tensor> embedding_fm_cuda(
    const Tensors& weights, const Tensors& indices, const Tensors& offsets, const Tensors& per_sample_weights,
    const Ints& tables, const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows,
    const Ints& known, const Names& names, const OptionalTensor& linear_weight, const OptionalTensor& dense,
    bool /* sparse: the backward's */) {
  const FeatureArgs args{indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows,
                         known,   &names};
  Forward forward(weights, args, true);
  std::vector<Bags>& features = forward.features;
  const Tensor& embeddings = forward.outs[0];
  const int64_t B = features[0].B, D = features[0].D;
  bool packed = true;
  for (size_t f = 0; f < args.size(); ++f) {
    RK_CHECK(features[f].D == D, "embedding_fm: features must have one width, but that of ", args.name(f),
             " is ", features[f].D, " and that of ", args.name(0), " ", D);
    packed = packed && features[f].packed;
  }
  Tensor fm = torch::stable::new_zeros(embeddings, {D > 0 ? 0 : B, 1}), linear = fm, a = fm;
  if (D > 0) fm = torch::stable::new_empty(embeddings, {B, 1});
  if (linear_weight) {
    a = linear_weight_of("embedding_fm", *linear_weight, embeddings, forward.width);
    linear = D > 0 ? torch::stable::new_empty(embeddings, {B, 1}) : torch::stable::new_zeros(fm, {B, 1});
    packed = packed && aligned(a.const_data_ptr());
  } else {
    linear = torch::stable::new_empty(embeddings, {0, 1});
  }
  if (B == 0 || D == 0) return {with_dense(embeddings, dense), fm, linear};

  const Device device(weights[0]);
  RangeReport report(device, weights[0]);
  dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Tensor carry;
    if (args.size() > Batch<Bags>::kItems)
      carry = torch::stable::new_empty(embeddings, {B, D + 2}, accumulator_dtype(embeddings.scalar_type()));
    const int lanes = log2_lanes(packed ? D / kPack<T> : D);
    for (size_t f = 0; f < args.size();) {
      Batch<Bags> batch;
      std::vector<size_t> launched;
      FmTerms terms{linear_weight ? static_cast<const T*>(a.const_data_ptr()) + f * D : nullptr,
                    fm.mutable_data_ptr(),
                    linear.mutable_data_ptr(),
                    args.size() > Batch<Bags>::kItems ? carry.mutable_data_ptr() : nullptr,
                    f == 0,
                    false};
      for (; f < args.size() && batch.n < Batch<Bags>::kItems; ++f) {
        features[f].packed = packed;
        features[f].log2_lanes = lanes;
        batch.items[batch.n++] = features[f];
        launched.push_back(f);
      }
      terms.last = f == args.size();
      device.launch(embedding_fm<T>, blocks_of(B), 0, batch, terms, report.start());
      report.finish(args, features, launched);
    }
  });
  return {with_dense(embeddings, dense), fm, linear};
}

// -> the gradient of the lookups [B, F D] and of the linear weights, [0] where there are none.
static std::tuple<Tensor, Tensor> embedding_fm_backward_cuda(const OptionalTensor& grad_embeddings,
                                                             const OptionalTensor& grad_fm,
                                                             const OptionalTensor& grad_linear,
                                                             const Tensor& embeddings,
                                                             const OptionalTensor& linear_weight, int64_t D) {
  RK_CHECK(on_device(embeddings), "embedding_fm_backward: embeddings must be on a GPU");
  const FmBackwardArgs args(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D);
  const int64_t B = args.B, width = args.width;
  Tensor grad_lookups = torch::stable::new_empty(embeddings, {B, width});
  Tensor grad_a = torch::stable::new_empty(embeddings, {0});
  if (linear_weight)
    grad_a = args.linear_weight && B > 0 ? torch::stable::new_empty(embeddings, linear_weight->sizes())
                                         : torch::stable::new_zeros(embeddings, linear_weight->sizes());
  if (B == 0 || width == 0) return {grad_lookups, grad_a};

  const Device device(embeddings);
  FmGrads grads{args.embeddings.const_data_ptr(),
                data_of(args.grad_embeddings),
                data_of(args.grad_fm),
                data_of(args.grad_linear),
                data_of(args.linear_weight),
                grad_lookups.mutable_data_ptr(),
                B,
                args.embeddings.stride(0),
                row_stride_of(args.grad_embeddings),
                checked_int32(args.F, "the number of features"),
                checked_int32(D, "the width of a table"),
                0,
                false};
  dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    grads.packed = D % kPack<T> == 0 && rows_aligned(args.embeddings) && rows_aligned(grad_lookups) &&
                   (!args.grad_embeddings || rows_aligned(*args.grad_embeddings)) &&
                   aligned(data_of(args.linear_weight));
    grads.log2_lanes = log2_lanes(grads.packed ? D / kPack<T> : D);
    device.launch(embedding_fm_backward<T>, blocks_of(B), 0, grads);
    if (!args.linear_weight) return;
    // One launch up to 4096 samples, then at most 256 parts; the order of the sums follows from B alone.
    const int64_t part = std::max<int64_t>(4096, (B + 255) / 256), n = (B + part - 1) / part;
    T* total = static_cast<T*>(grad_a.mutable_data_ptr());
    const int64_t blocks = n * ((width + kLinearColumns - 1) / kLinearColumns);
    const Tensor parts = torch::stable::new_empty(embeddings, {n > 1 ? n : 0, width},
                                                  accumulator_dtype(embeddings.scalar_type()));
    A* p = n > 1 ? static_cast<A*>(parts.mutable_data_ptr()) : nullptr;
    device.launch(embedding_linear<T>, blocks, kThreads * sizeof(A), grads, part, p, total);
    if (p) device.launch(embedding_linear_total<T>, blocks_for(width, 0), 0, p, n, width, total);
  });
  return {grad_lookups, grad_a};
}

}  // namespace cuda
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CUDA, m) {
  if (rk::cuda::refusal() != rk::cuda::Refusal::none) return;
  m.impl("embedding_fm", TORCH_BOX(&rk::cuda::embedding_fm_cuda));
  m.impl("embedding_fm_backward", TORCH_BOX(&rk::cuda::embedding_fm_backward_cuda));
}
