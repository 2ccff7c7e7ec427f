// Checks, threads and registration of a mixture's experts; the kernel and its mathematics are in
// mixed_experts_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/interaction/chunked_sums.h"
#include "cpu/interaction/params.h"
#include "cpu/interaction/square_operands.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/values.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

// The texts are those of ops/mixed_experts.py.
void check(const char* op, const Tensor& projections, const Tensor& weight) {
  RK_CHECK(projections.dim() == 2, op, ": projections must have 2 dimensions, got ", projections.dim(),
           " (shape ", shape_of(projections), ")");
  const ScalarType dtype = dtype_of(projections);
  RK_CHECK(is_floating(dtype), op, ": projections must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype));
  RK_CHECK(weight.dim() == 3 && weight.size(1) == weight.size(2), op, ": weight must be [E, r, r], got ",
           shape_of(weight));
  const int64_t E = weight.size(0), rank = weight.size(1);
  check_form(op, "weight", weight, {E, rank, rank}, dtype);
  check_form(op, "projections", projections, {projections.size(0), E * rank + E}, dtype);
}

template <class T>
MixedExperts<T> params(const Tensor& projections, const Tensor& weight, Arena<Accumulator<T>>& arena) {
  MixedExperts<T> a = experts_of<T>(weight, arena);
  a.projections = static_cast<const T*>(projections.const_data_ptr());
  a.stride_row = projections.stride(0);
  return a;
}

Tensor mixed_experts_cpu(const Tensor& projections, const Tensor& weight) {
  check("mixed_experts", projections, weight);
  const int64_t B = projections.size(0), E = weight.size(0), rank = weight.size(1);
  const Tensor pu = unit_stride_last(projections);
  Tensor out = new_empty_paged(projections, {B, E * rank});
  dispatch_floating(projections.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arena<Accumulator<T>> shared;
    MixedExperts<T> common = params<T>(pu, weight, shared);
    common.out = static_cast<T*>(out.mutable_data_ptr());
    common.stride_out = E * rank;
    torch::stable::parallel_for(0, B, kFmChunk / (E * rank + 1) + 1, [&](int64_t b0, int64_t b1) {
      Arena<Accumulator<T>> arena;
      MixedExperts<T> a = common;
      a.memory = arena.take(RK_DISPATCH_ISA(mixed_experts_memory<T>, E, rank));
      RK_DISPATCH_ISA(mixed_experts<T>, a, {b0, b1});
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> mixed_experts_backward_cpu(const Tensor& grad_out, const Tensor& projections,
                                                      const Tensor& weight) {
  const char* op = "mixed_experts_backward";
  check(op, projections, weight);
  const int64_t B = projections.size(0), E = weight.size(0), rank = weight.size(1);
  check_form(op, "grad_out", grad_out, {B, E * rank}, dtype_of(projections));
  const Tensor pu = unit_stride_last(projections), gu = unit_stride_last(grad_out);
  Tensor grad_projections = new_empty_paged(projections, {B, E * rank + E}), grad_weight;
  dispatch_floating(projections.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    Arena<A> shared;
    MixedExpertsBackward<T> common{};
    common.forward = params<T>(pu, weight, shared);
    common.weight = square_operands<A>(weight, false, shared);
    common.grad_out = static_cast<const T*>(gu.const_data_ptr());
    common.stride_grad = gu.stride(0);
    common.grad_projections = static_cast<T*>(grad_projections.mutable_data_ptr());
    common.stride_projections = E * rank + E;
    const int64_t stride = common.forward.stride;
    ChunkedSums<A> sums(B, E * rank, E * rank * stride);
    const A* sum = sums.run([&](Range samples, A* part) {
      Arena<A> arena;
      MixedExpertsBackward<T> a = common;
      a.forward.memory = arena.take(RK_DISPATCH_ISA(mixed_experts_memory<T>, E, rank));
      a.grad_weight = part;
      RK_DISPATCH_ISA(mixed_experts_backward<T>, a, samples);
    });
    grad_weight = gradient_of(weight, [&](int64_t i) { return sum[i / rank * stride + i % rank]; });
  });
  return {grad_projections, grad_weight};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("mixed_experts", TORCH_BOX(&rk::mixed_experts_cpu));
  m.impl("mixed_experts_backward", TORCH_BOX(&rk::mixed_experts_backward_cpu));
}
