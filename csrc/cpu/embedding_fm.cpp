// Lookup + FM + linear term in one pass: threads and registration. The mathematics are in embedding_fm.h and,
// of the lookups, embedding_bag.h.
#include <algorithm>
#include <optional>
#include <tuple>

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

using OptionalTensor = std::optional<Tensor>;

static Tensor linear_weight_of(const char* op, const Tensor& weight, const Tensor& like, int64_t width) {
  RK_CHECK(weight.numel() == width && weight.scalar_type() == like.scalar_type() && weight.is_cpu(), op,
           ": linear_weight must have one value a column of the embeddings, ", width, ", and their dtype, ",
           name_of(like.scalar_type()), ", got shape ", shape_of(weight), " and ",
           name_of(weight.scalar_type()));
  return torch::stable::contiguous(weight);
}

// A block of samples is looked up, all features, and then combined while its rows are in the cache.
static std::tuple<Tensor, Tensor, Tensor> embedding_fm_cpu(
    const Tensors& weights, const Tensors& indices, const Tensors& offsets, const Tensors& per_sample_weights,
    const Ints& tables, const Ints& modes, const Ints& padding_idx, const Ints& frozen_rows,
    const Names& names, const OptionalTensor& linear_weight, bool /* sparse: how the backward is to be */) {
  const ForwardArgs forward(
      weights, {indices, offsets, per_sample_weights, tables, modes, padding_idx, frozen_rows, &names}, true);
  const std::vector<Bags>& bags = forward.features.bags;
  const int64_t F = bags.size(), D = bags[0].D, B = bags[0].B, width = F * D;
  for (int64_t f = 0; f < F; ++f)
    RK_CHECK(bags[f].D == D, "embedding_fm: features must have one width, but that of ", forward.args.name(f),
             " is ", bags[f].D, " and that of ", forward.args.name(0), " ", D);
  const Tensor& embeddings = forward.outs[0];
  Tensor fm = torch::stable::new_empty(embeddings, {B, 1});
  Tensor linear = torch::stable::new_empty(embeddings, {linear_weight ? B : 0, 1});
  Tensor a = linear_weight ? linear_weight_of("embedding_fm", *linear_weight, embeddings, width) : linear;

  int64_t work = 0;
  for (const Bags& bag : bags) work += (bag.N + B) * (D + 16);  // as BagTasks counts
  constexpr int64_t kBlockBytes = 1 << 17;                      // an eighth of a second-level cache
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
      const T* x = static_cast<const T*>(embeddings.const_data_ptr());
      RK_DISPATCH_ISA(fm_interaction<T>, x, width, D, static_cast<T*>(fm.mutable_data_ptr()), b0, b1, F, D,
                      true);
      if (linear_weight)
        RK_DISPATCH_ISA(embedding_linear<T>, x, width, static_cast<const T*>(a.const_data_ptr()), width,
                        static_cast<T*>(linear.mutable_data_ptr()), b0, b1);
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
  RK_CHECK_DIM("embedding_fm_backward", embeddings, 2);
  RK_CHECK_FLOATING("embedding_fm_backward", embeddings);
  RK_CHECK_CPU("embedding_fm_backward", embeddings);
  const int64_t B = embeddings.size(0), width = embeddings.size(1);
  RK_CHECK(D > 0 ? width % D == 0 : width == 0, "embedding_fm_backward: embeddings have ", width,
           " columns, no multiple of ", D);
  const auto rows_of = [&](const Tensor& t, const char* what, int64_t columns) {
    RK_CHECK(t.dim() == 2 && t.size(0) == B && t.size(1) == columns && t.is_cpu() &&
                 t.scalar_type() == embeddings.scalar_type(),
             "embedding_fm_backward: ", what, " must be [", B, ", ", columns, "] like the embeddings, ",
             name_of(embeddings.scalar_type()), " on the CPU, got shape ", shape_of(t), " and ",
             name_of(t.scalar_type()));
    return columns == 1 ? torch::stable::contiguous(t) : unit_stride_last(t);
  };
  const bool has_linear = linear_weight && grad_linear;
  const Tensor x = unit_stride_last(embeddings);
  const Tensor ge = grad_embeddings ? rows_of(*grad_embeddings, "grad_embeddings", width) : x;
  const Tensor gf = grad_fm ? rows_of(*grad_fm, "grad_fm", 1) : x;
  const Tensor gl = has_linear ? rows_of(*grad_linear, "grad_linear", 1) : x;
  const Tensor a =
      has_linear ? linear_weight_of("embedding_fm_backward", *linear_weight, embeddings, width) : x;
  Tensor grad_lookups = new_empty_paged(embeddings, {B, width});
  Tensor grad_a = linear_weight ? torch::stable::new_zeros(*linear_weight, linear_weight->sizes())
                                : torch::stable::new_empty(embeddings, {0});
  const FmGrads grads{x.const_data_ptr(),
                      grad_embeddings ? ge.const_data_ptr() : nullptr,
                      grad_fm ? gf.const_data_ptr() : nullptr,
                      has_linear ? gl.const_data_ptr() : nullptr,
                      has_linear ? a.const_data_ptr() : nullptr,
                      grad_lookups.mutable_data_ptr(),
                      x.stride(0),
                      ge.stride(0),
                      D > 0 ? width / D : 0,
                      D};
  constexpr int64_t kBlock = 256;  // samples; a constant, because the order of grad_a's sums follows from it
  const int64_t blocks = (B + kBlock - 1) / kBlock, partials = has_linear ? width : 0;
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
