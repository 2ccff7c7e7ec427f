// Checks, threads and registration of the FM interaction; the kernel and its mathematics are in
// fm_interaction_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/dense/params.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

Tensor fm_interaction_cpu(const Tensor& x, bool reduce_sum) {
  RK_CHECK_DIM("fm_interaction", x, 3);
  RK_CHECK_FLOATING("fm_interaction", x);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2);
  const Tensor xu = unit_stride_last(x);
  Tensor out = torch::stable::new_empty(x, {B, reduce_sum ? 1 : D});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    FmInteraction<T> a{};
    a.x = static_cast<const T*>(xu.const_data_ptr());
    a.stride_sample = xu.stride(0);
    a.stride_field = xu.stride(1);
    a.out = static_cast<T*>(out.mutable_data_ptr());
    a.F = F;
    a.D = D;
    a.reduce_sum = reduce_sum;
    torch::stable::parallel_for(0, B, kFmChunk / (F * D + 1) + 1, [&](int64_t b0, int64_t b1) {
      RK_DISPATCH_ISA(fm_interaction<T>, a, {b0, b1});
    });
  });
  return out;
}

Tensor fm_interaction_backward_cpu(const Tensor& grad_out, const Tensor& x, bool reduce_sum) {
  RK_CHECK_DIM("fm_interaction_backward", x, 3);
  RK_CHECK_FLOATING("fm_interaction_backward", x);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2), width = reduce_sum ? 1 : D;
  check_form("fm_interaction_backward", "grad_out", grad_out, {B, width}, dtype_of(x));
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out);
  Tensor grad_x = new_empty_paged(x, {B, F, D});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    FmInteractionBackward<T> a{};
    a.grad_out = static_cast<const T*>(gu.const_data_ptr());
    a.stride_grad = gu.stride(0);
    a.x = static_cast<const T*>(xu.const_data_ptr());
    a.stride_sample = xu.stride(0);
    a.stride_field = xu.stride(1);
    a.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    a.F = F;
    a.D = D;
    a.reduce_sum = reduce_sum;
    a.non_temporal = is_non_temporal(grad_x);
    torch::stable::parallel_for(0, B, kFmChunk / (F * D + 1) + 1, [&](int64_t b0, int64_t b1) {
      RK_DISPATCH_ISA(fm_interaction_backward<T>, a, {b0, b1});
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("fm_interaction", TORCH_BOX(&rk::fm_interaction_cpu));
  m.impl("fm_interaction_backward", TORCH_BOX(&rk::fm_interaction_backward_cpu));
}
