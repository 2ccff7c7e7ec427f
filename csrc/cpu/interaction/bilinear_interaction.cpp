// Checks, threads and registration of the bilinear interaction; the kernel and its mathematics are in
// bilinear_interaction_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cpu/interaction/chunked_sums.h"
#include "cpu/interaction/params.h"
#include "cpu/interaction/square_operands.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/values.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

constexpr const char* kKinds[] = {"all", "each", "interaction"};

// The texts are those of ops/bilinear_interaction.py.
void check(const char* op, const Tensor& x, const Tensors& weights, int64_t kind) {
  RK_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, got ", x.dim(), " (shape ", shape_of(x), ")");
  RK_CHECK(is_floating(dtype_of(x)), op, ": x must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype_of(x)));
  RK_CHECK(kind >= 0 && kind <= 2, op, ": kind must be 0 .. 2, got ", kind);
  const int64_t F = x.size(1), D = x.size(2),
                wanted = kind == 0   ? 1
                         : kind == 1 ? std::max<int64_t>(F - 1, 0)
                                     : F * (F - 1) / 2;
  RK_CHECK(static_cast<int64_t>(weights.size()) == wanted, op, ": field_", kKinds[kind], " of ", F,
           " fields needs ", wanted, " weights, got ", weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + ']';
    check_form(op, name.c_str(), weights[i], {D, D}, dtype_of(x));
  }
}

template <class A>
const A* operands(const Tensors& weights, ScalarType dtype, int64_t D, bool transposed, Arena<A>& arena) {
  return square_operands<A>(dtype, weights.size(), D, transposed, arena, [&](int64_t w) {
    return SquareMatrix{weights[w].const_data_ptr(), weights[w].stride(0), weights[w].stride(1)};
  });
}

// Gradients like the weights, of sums that lie as the operands do.
template <class A>
Tensors gradients_of(const Tensors& weights, int64_t D, const A* sums) {
  const int64_t stride = padded<A>(D), count = weights.size();
  Tensors grads;
  for (const Tensor& weight : weights) grads.push_back(torch::stable::new_empty(weight, weight.sizes()));
  if (count == 0) return grads;
  with_values(dtype_of(weights[0]), [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    run_tasks(count, count * D * D, [&](int64_t w) {
      P* to = static_cast<P*>(grads[w].mutable_data_ptr());
      for (int64_t i = 0; i < D; ++i)
        for (int64_t j = 0; j < D; ++j) to[i * D + j] = static_cast<P>(sums[(w * D + i) * stride + j]);
    });
  });
  return grads;
}

template <class T>
BilinearInteraction<T> params(const Tensor& x, const Tensors& weights, int64_t kind,
                              Arena<Accumulator<T>>& arena) {
  BilinearInteraction<T> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.stride_sample = x.stride(0);
  a.stride_field = x.stride(1);
  a.F = x.size(1);
  a.D = x.size(2);
  a.transposed = operands<Accumulator<T>>(weights, dtype_of(x), a.D, true, arena);
  a.stride = padded<Accumulator<T>>(a.D);
  a.kind = static_cast<Bilinear>(kind);
  return a;
}

Tensor bilinear_interaction_cpu(const Tensor& x, const Tensors& weights, int64_t kind) {
  check("bilinear_interaction", x, weights, kind);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2), pairs = F * (F - 1) / 2;
  const Tensor xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x, {B, pairs, D});
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arena<Accumulator<T>> shared;
    BilinearInteraction<T> common = params<T>(xu, weights, kind, shared);
    common.out = static_cast<T*>(out.mutable_data_ptr());
    common.non_temporal = D * sizeof(T) % kCacheLine == 0 && is_non_temporal(out);
    torch::stable::parallel_for(0, B, kFmChunk / (pairs * D + 1) + 1, [&](int64_t b0, int64_t b1) {
      Arena<Accumulator<T>> arena;
      BilinearInteraction<T> a = common;
      a.memory = arena.take(RK_DISPATCH_ISA(bilinear_interaction_memory<T>, F, D));
      RK_DISPATCH_ISA(bilinear_interaction<T>, a, {b0, b1});
    });
  });
  return out;
}

std::tuple<Tensor, Tensors> bilinear_interaction_backward_cpu(const Tensor& grad_out, const Tensor& x,
                                                              const Tensors& weights, int64_t kind) {
  const char* op = "bilinear_interaction_backward";
  check(op, x, weights, kind);
  const int64_t B = x.size(0), F = x.size(1), D = x.size(2), pairs = F * (F - 1) / 2;
  check_form(op, "grad_out", grad_out, {B, pairs, D}, dtype_of(x));
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out);
  Tensor grad_x = new_empty_paged(x, {B, F, D});
  Tensors grad_weights;
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    Arena<A> shared;
    BilinearInteractionBackward<T> common{};
    common.forward = params<T>(xu, weights, kind, shared);
    common.weights = operands<A>(weights, dtype_of(x), D, false, shared);
    common.grad_out = static_cast<const T*>(gu.const_data_ptr());
    common.stride_grad = gu.stride(0);
    common.stride_pair = gu.stride(1);
    common.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    ChunkedSums<A> sums(B, pairs * D, weights.size() * D * common.forward.stride);
    const A* sum = sums.run([&](Range samples, A* part) {
      Arena<A> arena;
      BilinearInteractionBackward<T> a = common;
      a.forward.memory = arena.take(RK_DISPATCH_ISA(bilinear_interaction_memory<T>, F, D));
      a.grad_weights = part;
      RK_DISPATCH_ISA(bilinear_interaction_backward<T>, a, samples);
    });
    grad_weights = gradients_of(weights, D, sum);
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("bilinear_interaction", TORCH_BOX(&rk::bilinear_interaction_cpu));
  m.impl("bilinear_interaction_backward", TORCH_BOX(&rk::bilinear_interaction_backward_cpu));
}
