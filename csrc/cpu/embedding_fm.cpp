// Lookup + FM + linear term in one pass: threads and registration. The mathematics are in embedding_fm.h and,
// of the lookups, embedding_bag.h.
#include <algorithm>
#include <tuple>

#include "../embedding_fm_arguments.h"
#include "dispatch.h"
#include "embedding_bag_forward.h"
#include "embedding_bag_sort.h"
#include "embedding_fm_args.h"
#include "memory.h"

namespace rk {

RK_DECLARE_ISA(template <class T>
               void fm_interaction(const T*, int64_t, int64_t, T*, int64_t, int64_t, int64_t, int64_t, bool))
RK_DECLARE_ISA(template <class T>
               void embedding_linear(const T*, int64_t, const T*, int64_t, T*, int64_t, int64_t))
RK_DECLARE_ISA(template <class T, class A> void embedding_fm_backward(const FmGrads&, int64_t, int64_t, A*))
RK_DECLARE_ISA(template <class T, class A> void embedding_fm_sum(const A*, int64_t, int64_t, T*))

// A block of samples is looked up, all features, and then combined while its rows are in the cache.
static std::tuple<Tensor, Tensor, Tensor> embedding_fm_cpu(
    const Tensors& weights, const Tensors& indices, const Tensors& offsets, const Tensors& per_sample_weights,
    const Ints& tables, const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows,
    const Names& names, const OptionalTensor& linear_weight, const OptionalTensor& dense,
    bool /* sparse: how the backward is to be */) {
  const int64_t more = dense && dense->dim() == 2 ? dense->size(1) : 0;
  const ForwardArgs forward(
      weights, {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, &names}, true,
      more);
  const std::vector<Bags>& bags = forward.features.bags;
  const int64_t F = bags.size(), D = bags[0].D, B = bags[0].B, width = F * D;
  for (int64_t f = 0; f < F; ++f)
    RK_CHECK(bags[f].D == D, "embedding_fm: features must have one width, but that of ", forward.args.name(f),
             " is ", bags[f].D, " and that of ", forward.args.name(0), " ", D);
  const Tensor& embeddings = forward.outs[0];
  Tensor fm = torch::stable::new_empty(embeddings, {B, 1});
  Tensor linear = torch::stable::new_empty(embeddings, {linear_weight ? B : 0, 1});
  const Tensor a =
      linear_weight ? linear_weight_of("embedding_fm", *linear_weight, embeddings, width) : linear;
  if (dense) check_dense(*dense, embeddings, B);

  int64_t work = 0;
  for (const Bags& bag : bags) work += lookup_work(bag);
  constexpr int64_t kBlockBytes = 1 << 17;  // an eighth of a second-level cache
  const int64_t block = std::clamp<int64_t>(kBlockBytes / (width * embeddings.element_size() + 1), 16, 1024);
  std::atomic<bool> fit{true};
  run_tasks((B + block - 1) / block, work, [&](int64_t task) {
    const int64_t b0 = task * block, b1 = std::min(B, b0 + block);
    for (int64_t f = 0; f < F; ++f)
      if (!forward.look_up(f, b0, b1)) {
        fit = false;
        return;
      }
    dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* x = static_cast<T*>(embeddings.mutable_data_ptr());
      const int64_t stride_xb = width + more;
      RK_DISPATCH_ISA(fm_interaction<T>, x, stride_xb, D, static_cast<T*>(fm.mutable_data_ptr()), b0, b1, F,
                      D, true);
      if (linear_weight)
        RK_DISPATCH_ISA(embedding_linear<T>, x, stride_xb, static_cast<const T*>(a.const_data_ptr()), width,
                        static_cast<T*>(linear.mutable_data_ptr()), b0, b1);
      if (more == 0) return;
      const T* beside = static_cast<const T*>(dense->const_data_ptr());
      const int64_t stride_db = dense->stride(0), stride_dn = dense->stride(1);
      for (int64_t b = b0; b < b1; ++b)
        for (int64_t n = 0; n < more; ++n)
          x[b * stride_xb + width + n] = beside[b * stride_db + n * stride_dn];
    });
  });
  if (!fit) forward.check_range();
  return {embeddings, fm, linear};
}

// -> the gradient of the lookups [B, F D] and of the linear weights, [0] where there are none.
static std::tuple<Tensor, Tensor> embedding_fm_backward_cpu(const OptionalTensor& grad_embeddings,
                                                            const OptionalTensor& grad_fm,
                                                            const OptionalTensor& grad_linear,
                                                            const Tensor& embeddings,
                                                            const OptionalTensor& linear_weight, int64_t D) {
  RK_CHECK_CPU("embedding_fm_backward", embeddings);
  const FmBackwardArgs args(grad_embeddings, grad_fm, grad_linear, embeddings, linear_weight, D);
  const int64_t B = args.B, width = args.width;
  Tensor grad_lookups = new_empty_paged(embeddings, {B, width});
  Tensor grad_a = linear_weight ? torch::stable::new_zeros(*linear_weight, linear_weight->sizes())
                                : torch::stable::new_empty(embeddings, {0});
  const FmGrads grads{args.embeddings.const_data_ptr(),
                      data_of(args.grad_embeddings),
                      data_of(args.grad_fm),
                      data_of(args.grad_linear),
                      data_of(args.linear_weight),
                      grad_lookups.mutable_data_ptr(),
                      args.embeddings.stride(0),
                      row_stride_of(args.grad_embeddings),
                      args.F,
                      D};
  constexpr int64_t kBlock = 256;  // samples; a constant, because the order of grad_a's sums follows from it
  const int64_t blocks = (B + kBlock - 1) / kBlock, partials = args.linear_weight ? width : 0;
  dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const auto sums = uninitialized<A>(blocks * partials);
    run_tasks(blocks, 3 * B * width, [&](int64_t i) {
      A* sum = sums.get() + i * partials;
      std::fill_n(sum, partials, A(0));
      RK_DISPATCH_ISA(embedding_fm_backward<T>, grads, i * kBlock, std::min(B, (i + 1) * kBlock), sum);
    });
    RK_DISPATCH_ISA(embedding_fm_sum, sums.get(), blocks, partials,
                    static_cast<T*>(grad_a.mutable_data_ptr()));
  });
  return {grad_lookups, grad_a};
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("embedding_fm", TORCH_BOX(&rk::embedding_fm_cpu));
  m.impl("embedding_fm_backward", TORCH_BOX(&rk::embedding_fm_backward_cpu));
}
