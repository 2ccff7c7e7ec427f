// Checks, threads and registration of the FM interaction; the kernel and its mathematics are in
// fm_interaction_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "stable/check.h"

namespace rk {

RK_DECLARE_ISA(template <class T>
               void fm_interaction(const T*, int64_t, int64_t, T*, int64_t, int64_t, int64_t, int64_t, bool))
RK_DECLARE_ISA(template <class T> void fm_interaction_backward(const T*, int64_t, const T*, int64_t, int64_t,
                                                               T*, int64_t, int64_t, int64_t, int64_t, bool,
                                                               bool))

// A chunk of work worth waking a thread for, in elements of x: about 10 us.
constexpr int64_t kGrain = 32768;

static Tensor fm_interaction_cpu(const Tensor& x, bool reduce_sum) {
  RK_CHECK_DIM("fm_interaction", x, 3);
  RK_CHECK_FLOATING("fm_interaction", x);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2);
  const Tensor xu = unit_stride_last(x);
  Tensor out = torch::stable::new_empty(x, {B, reduce_sum ? 1 : D});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* xp = static_cast<const T*>(xu.const_data_ptr());
    T* outp = static_cast<T*>(out.mutable_data_ptr());
    const int64_t stride_xb = xu.stride(0), stride_xf = xu.stride(1);
    torch::stable::parallel_for(0, B, kGrain / (F * D + 1) + 1, [=](int64_t b0, int64_t b1) {
      RK_DISPATCH_ISA(fm_interaction<T>, xp, stride_xb, stride_xf, outp, b0, b1, F, D, reduce_sum);
    });
  });
  return out;
}

static Tensor fm_interaction_backward_cpu(const Tensor& grad_out, const Tensor& x, bool reduce_sum) {
  RK_CHECK_DIM("fm_interaction_backward", x, 3);
  RK_CHECK_FLOATING("fm_interaction_backward", x);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2), width = reduce_sum ? 1 : D;
  check_form("fm_interaction_backward", "grad_out", grad_out, {B, width}, dtype_of(x));
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out);
  Tensor grad_x = new_empty_paged(x, {B, F, D});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *xp = static_cast<const T*>(xu.const_data_ptr()),
            *gp = static_cast<const T*>(gu.const_data_ptr());
    T* grad_xp = static_cast<T*>(grad_x.mutable_data_ptr());
    const bool streamed = is_streamed(grad_x);
    const int64_t stride_gb = gu.stride(0), stride_xb = xu.stride(0), stride_xf = xu.stride(1);
    torch::stable::parallel_for(0, B, kGrain / (F * D + 1) + 1, [=](int64_t b0, int64_t b1) {
      RK_DISPATCH_ISA(fm_interaction_backward<T>, gp, stride_gb, xp, stride_xb, stride_xf, grad_xp, b0, b1, F,
                      D, reduce_sum, streamed);
    });
  });
  return grad_x;
}

}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("fm_interaction", TORCH_BOX(&rk::fm_interaction_cpu));
  m.impl("fm_interaction_backward", TORCH_BOX(&rk::fm_interaction_backward_cpu));
}
