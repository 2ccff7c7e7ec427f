// Checks, threads and registration of the pairwise dots; the kernel and its mathematics are in
// pairwise_dot_kernel.h.
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

struct Shape {
  int64_t B, F, D, pairs;
};

// The texts are those of ops/pairwise_dot.py.
Shape check(const char* op, const Tensor& embeddings, const OptionalTensor& field_weights) {
  RK_CHECK(embeddings.dim() == 3, op, ": embeddings must have 3 dimensions, got ", embeddings.dim(),
           " (shape ", shape_of(embeddings), ")");
  RK_CHECK(is_floating(dtype_of(embeddings)), op,
           ": embeddings must be float32, float64, float16 or bfloat16, got ", name_of(dtype_of(embeddings)));
  const int64_t F = embeddings.size(1), pairs = F * (F - 1) / 2;
  if (field_weights) check_form(op, "field_weights", *field_weights, {pairs}, dtype_of(embeddings));
  return {embeddings.size(0), F, embeddings.size(2), pairs};
}

template <class T>
PairwiseDot<T> params(const Tensor& x, const OptionalTensor& field_weights, Arena<Accumulator<T>>& arena) {
  PairwiseDot<T> a{};
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.stride_sample = x.stride(0);
  a.stride_field = x.stride(1);
  if (field_weights) a.field_weights = arena.row(values_of<Accumulator<T>>(*field_weights));
  a.F = x.size(1);
  a.D = x.size(2);
  return a;
}

Tensor pairwise_dot_cpu(const Tensor& embeddings, const OptionalTensor& field_weights) {
  const Shape shape = check("pairwise_dot", embeddings, field_weights);
  const Tensor x = unit_stride_last(embeddings);
  Tensor out = new_empty_paged(embeddings, {shape.B, shape.pairs});
  dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Arena<Accumulator<T>> shared;
    PairwiseDot<T> common = params<T>(x, field_weights, shared);
    common.out = static_cast<T*>(out.mutable_data_ptr());
    const int64_t chunk = kFmChunk / (shape.F * shape.D + shape.pairs + 1) + 1;
    torch::stable::parallel_for(0, shape.B, chunk, [&](int64_t b0, int64_t b1) {
      Arena<Accumulator<T>> arena;
      PairwiseDot<T> a = common;
      a.memory = arena.take(RK_DISPATCH_ISA(pairwise_dot_memory<T>, shape.F, shape.D));
      RK_DISPATCH_ISA(pairwise_dot<T>, a, {b0, b1});
    });
  });
  return out;
}

std::tuple<Tensor, Tensors> pairwise_dot_backward_cpu(const Tensor& grad_out, const Tensor& embeddings,
                                                      const OptionalTensor& field_weights) {
  const char* op = "pairwise_dot_backward";
  const Shape shape = check(op, embeddings, field_weights);
  check_form(op, "grad_out", grad_out, {shape.B, shape.pairs}, dtype_of(embeddings));
  const Tensor x = unit_stride_last(embeddings), gu = unit_stride_last(grad_out);
  Tensor grad_x = new_empty_paged(embeddings, {shape.B, shape.F, shape.D});
  Tensors grad_weights;
  dispatch_floating(embeddings.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    Arena<A> shared;
    PairwiseDotBackward<T> common{};
    common.forward = params<T>(x, field_weights, shared);
    common.grad_out = static_cast<const T*>(gu.const_data_ptr());
    common.stride_grad = gu.stride(0);
    common.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    ChunkedSums<A> sums(shape.B, 2 * shape.F * shape.D + shape.pairs, field_weights ? shape.pairs : 0);
    const A* sum = sums.run([&](Range samples, A* part) {
      Arena<A> arena;
      PairwiseDotBackward<T> a = common;
      a.forward.memory = arena.take(RK_DISPATCH_ISA(pairwise_dot_memory<T>, shape.F, shape.D));
      a.sum_weights = part;
      RK_DISPATCH_ISA(pairwise_dot_backward<T>, a, samples);
    });
    if (field_weights) grad_weights.push_back(gradient_of(*field_weights, [&](int64_t i) { return sum[i]; }));
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("pairwise_dot", TORCH_BOX(&rk::pairwise_dot_cpu));
  m.impl("pairwise_dot_backward", TORCH_BOX(&rk::pairwise_dot_backward_cpu));
}
