// Checks, threads and registration of what follows the product of a cross layer; the kernel and its
// mathematics are in cross_layer_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/interaction/chunked_sums.h"
#include "cpu/interaction/params.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/values.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

// The texts are those of ops/cross_layer.py.
void check(const char* op, const Tensor& x0) {
  RK_CHECK(x0.dim() == 2, op, ": x0 must have 2 dimensions, got ", x0.dim(), " (shape ", shape_of(x0), ")");
  RK_CHECK(is_floating(dtype_of(x0)), op, ": x0 must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype_of(x0)));
}

Tensor cross_layer_cpu(const Tensor& x0, const Tensor& product, const Tensor& x, const OptionalTensor& bias) {
  const char* op = "cross_layer";
  check(op, x0);
  const int64_t B = x0.size(0), D = x0.size(1);
  check_form(op, "product", product, {B, D}, dtype_of(x0));
  check_form(op, "x", x, {B, D}, dtype_of(x0));
  if (bias) check_form(op, "bias", *bias, {D}, dtype_of(x0));
  const Tensor x0u = unit_stride_last(x0), pu = unit_stride_last(product), xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x0, {B, D});
  dispatch_floating(x0.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arena<Accumulator<T>> arena;
    CrossLayer<T> a{};
    a.x0 = static_cast<const T*>(x0u.const_data_ptr());
    a.product = static_cast<const T*>(pu.const_data_ptr());
    a.x = static_cast<const T*>(xu.const_data_ptr());
    a.stride_x0 = x0u.stride(0);
    a.stride_product = pu.stride(0);
    a.stride_x = xu.stride(0);
    if (bias) a.bias = arena.row(values_of<Accumulator<T>>(*bias));
    a.out = static_cast<T*>(out.mutable_data_ptr());
    a.D = D;
    torch::stable::parallel_for(0, B, kFmChunk / (3 * D + 1) + 1, [&](int64_t b0, int64_t b1) {
      RK_DISPATCH_ISA(cross_layer<T>, a, {b0, b1});
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensors> cross_layer_backward_cpu(const Tensor& grad_out, const Tensor& x0,
                                                             const Tensor& product, bool has_bias) {
  const char* op = "cross_layer_backward";
  check(op, x0);
  const int64_t B = x0.size(0), D = x0.size(1);
  check_form(op, "grad_out", grad_out, {B, D}, dtype_of(x0));
  check_form(op, "product", product, {B, D}, dtype_of(x0));
  const Tensor gu = unit_stride_last(grad_out), x0u = unit_stride_last(x0), pu = unit_stride_last(product);
  Tensor grad_x0 = new_empty_paged(x0, {B, D}), grad_product = new_empty_paged(x0, {B, D});
  Tensors grad_bias;
  if (has_bias) grad_bias.push_back(torch::stable::new_empty(x0, {D}));
  dispatch_floating(x0.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    CrossLayerBackward<T> common{};
    common.grad_out = static_cast<const T*>(gu.const_data_ptr());
    common.x0 = static_cast<const T*>(x0u.const_data_ptr());
    common.product = static_cast<const T*>(pu.const_data_ptr());
    common.stride_grad = gu.stride(0);
    common.stride_x0 = x0u.stride(0);
    common.stride_product = pu.stride(0);
    common.grad_x0 = static_cast<T*>(grad_x0.mutable_data_ptr());
    common.grad_product = static_cast<T*>(grad_product.mutable_data_ptr());
    common.D = D;
    ChunkedSums<A> sums(B, 3 * D, has_bias ? D : 0);
    const A* sum = sums.run([&](Range rows, A* part) {
      CrossLayerBackward<T> a = common;
      a.sum_out = has_bias ? part : nullptr;
      RK_DISPATCH_ISA(cross_layer_backward<T>, a, rows);
    });
    if (has_bias) grad_bias[0] = gradient_of(grad_bias[0], [&](int64_t d) { return sum[d]; });
  });
  return {grad_x0, grad_product, grad_bias};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("cross_layer", TORCH_BOX(&rk::cross_layer_cpu));
  m.impl("cross_layer_backward", TORCH_BOX(&rk::cross_layer_backward_cpu));
}
