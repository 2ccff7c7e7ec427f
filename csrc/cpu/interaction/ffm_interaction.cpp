// Checks, threads and registration of the field-aware interactions; the kernel and its mathematics are in
// ffm_interaction_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/interaction/params.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

// The texts are those of ops/ffm_interaction.py.
void check(const char* op, const Tensor& x) {
  RK_CHECK(x.dim() == 4, op, ": x must have 4 dimensions, got ", x.dim(), " (shape ", shape_of(x), ")");
  RK_CHECK(is_floating(dtype_of(x)), op, ": x must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype_of(x)));
  RK_CHECK(x.size(1) == x.size(2), op, ": x must be [B, F, F, D], got ", shape_of(x));
}

template <class T>
FfmInteraction<T> params(const Tensor& x, bool reduce_sum, const Tensor& written) {
  FfmInteraction<T> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.stride_sample = x.stride(0);
  a.stride_field = x.stride(1);
  a.stride_other = x.stride(2);
  a.F = x.size(1);
  a.D = x.size(3);
  a.reduce_sum = reduce_sum;
  a.non_temporal = a.D * sizeof(T) % kCacheLine == 0 && is_non_temporal(written);
  return a;
}

template <class Body>
void for_samples(const Tensor& x, const Body& body) {
  torch::stable::parallel_for(0, x.size(0), kFmChunk / (x.size(1) * x.size(2) * x.size(3) + 1) + 1, body);
}

Tensor ffm_interaction_cpu(const Tensor& x, bool reduce_sum) {
  check("ffm_interaction", x);
  const int64_t F = x.size(1);
  const Tensor xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x, {x.size(0), F * (F - 1) / 2, reduce_sum ? 1 : x.size(3)});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    FfmInteraction<T> a = params<T>(xu, reduce_sum, out);
    a.out = static_cast<T*>(out.mutable_data_ptr());
    for_samples(xu, [&](int64_t b0, int64_t b1) { RK_DISPATCH_ISA(ffm_interaction<T>, a, {b0, b1}); });
  });
  return out;
}

Tensor ffm_interaction_backward_cpu(const Tensor& grad_out, const Tensor& x, bool reduce_sum) {
  check("ffm_interaction_backward", x);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(3);
  check_form("ffm_interaction_backward", "grad_out", grad_out, {B, F * (F - 1) / 2, reduce_sum ? 1 : D},
             dtype_of(x));
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out);
  Tensor grad_x = new_empty_paged(x, {B, F, F, D});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    FfmInteractionBackward<T> a{};
    a.forward = params<T>(xu, reduce_sum, grad_x);
    a.grad_out = static_cast<const T*>(gu.const_data_ptr());
    a.stride_grad = gu.stride(0);
    a.stride_pair = gu.stride(1);
    a.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    for_samples(xu,
                [&](int64_t b0, int64_t b1) { RK_DISPATCH_ISA(ffm_interaction_backward<T>, a, {b0, b1}); });
  });
  return grad_x;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("ffm_interaction", TORCH_BOX(&rk::ffm_interaction_cpu));
  m.impl("ffm_interaction_backward", TORCH_BOX(&rk::ffm_interaction_backward_cpu));
}
