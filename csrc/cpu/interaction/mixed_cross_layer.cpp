// Checks, operands, threads and registration of a cross layer of experts; the kernel and its mathematics are
// in mixed_cross_layer_kernel.h.
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

// The texts are those of ops/mixed_cross_layer.py.
void check(const char* op, const Tensor& x0, const Tensor& x, const Tensor& u, const Tensor& v,
           const Tensor& weight, const Tensor& gates, const Tensor& bias) {
  RK_CHECK(x0.dim() == 2, op, ": x0 must have 2 dimensions, got ", x0.dim(), " (shape ", shape_of(x0), ")");
  const ScalarType dtype = dtype_of(x0);
  RK_CHECK(is_floating(dtype), op, ": x0 must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype));
  RK_CHECK(weight.dim() == 3 && weight.size(1) == weight.size(2), op, ": weight must be [E, r, r], got ",
           shape_of(weight));
  const int64_t D = x0.size(1), E = weight.size(0), rank = weight.size(1);
  check_form(op, "weight", weight, {E, rank, rank}, dtype);
  check_form(op, "x", x, {x0.size(0), D}, dtype);
  check_form(op, "u", u, {E, D, rank}, dtype);
  check_form(op, "v", v, {E, D, rank}, dtype);
  check_form(op, "gates", gates, {E, D}, dtype);
  check_form(op, "bias", bias, {D}, dtype);
}

// How many values of operands lie apart: those of an expert, a column of the layer, and a column of the
// expert.
struct Strides {
  int64_t expert, column, rank;
};

// Sizes of the layer, and what lies between [E, D, r] of the parameters and the operands of the GEMM.
template <class A>
struct Operands {
  int64_t D, E, rank, columns, stride_input = padded<A>(D), stride_projections = padded<A>(columns),
                               stride_experts = padded<A>(E * rank);

  explicit Operands(const Tensor& u) : D(u.size(1)), E(u.size(0)), rank(u.size(2)), columns(E * rank + E) {}

  // Calls body(expert) on several threads, if that is worth one.
  template <class Body>
  void for_each_expert(const Body& body) const {
    torch::stable::parallel_for(0, E, kFmChunk / (2 * D * rank + 1) + 1, [&](int64_t first, int64_t last) {
      for (int64_t e = first; e < last; ++e) body(e);
    });
  }

  // Of an expert, between its parameters and the operand.
  template <class Body>
  void for_each(int64_t e, const Strides& to, const Body& body) const {
    for (int64_t d = 0; d < D; ++d)
      for (int64_t j = 0; j < rank; ++j)
        body((e * D + d) * rank + j, e * to.expert + d * to.column + j * to.rank);
  }

  // v [D, columns] and u [E rank, D] of the forward, or transposed.
  std::pair<const A*, const A*> pack(const Tensor& u, const Tensor& v, const Tensor& gates, bool transposed,
                                     Arena<A>& arena) const {
    const Tensor uc = torch::stable::contiguous(u), vc = torch::stable::contiguous(v),
                 gc = torch::stable::contiguous(gates);
    A *to_v = arena.take(transposed ? operand_size<A>(columns, D) : operand_size<A>(D, columns)),
      *to_u = arena.take(transposed ? operand_size<A>(D, E * rank) : operand_size<A>(E * rank, D));
    const Strides of_v = v_strides(transposed), of_u = u_strides(!transposed);
    with_values(dtype_of(u), [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      const auto *from_u = static_cast<const P*>(uc.const_data_ptr()),
                 *from_v = static_cast<const P*>(vc.const_data_ptr()),
                 *from_gates = static_cast<const P*>(gc.const_data_ptr());
      for_each_expert([&](int64_t e) {
        for_each(e, of_u, [&](int64_t i, int64_t o) { to_u[o] = static_cast<A>(from_u[i]); });
        for_each(e, of_v, [&](int64_t i, int64_t o) { to_v[o] = static_cast<A>(from_v[i]); });
        for (int64_t d = 0; d < D; ++d)
          to_v[gate(e, of_v) + d * of_v.column] = static_cast<A>(from_gates[e * D + d]);
      });
    });
    copy_tail(to_v, transposed ? columns : D, transposed ? D : columns);
    copy_tail(to_u, transposed ? D : E * rank, transposed ? E * rank : D);
    return {to_v, to_u};
  }

  // The gradients of [E, D, r] from the sums, u [D, E rank] and v [columns, D].
  void unpack(const A* from_u, const A* from_v, Tensor& u, Tensor& v, Tensor& gates) const {
    const Strides of_u = u_strides(false), of_v = v_strides(true);
    with_values(dtype_of(u), [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      auto *to_u = static_cast<P*>(u.mutable_data_ptr()), *to_v = static_cast<P*>(v.mutable_data_ptr()),
           *to_gates = static_cast<P*>(gates.mutable_data_ptr());
      for_each_expert([&](int64_t e) {
        for_each(e, of_u, [&](int64_t i, int64_t o) { to_u[i] = static_cast<P>(from_u[o]); });
        for_each(e, of_v, [&](int64_t i, int64_t o) { to_v[i] = static_cast<P>(from_v[o]); });
        for (int64_t d = 0; d < D; ++d) to_gates[e * D + d] = static_cast<P>(from_v[gate(e, of_v) + d]);
      });
    });
  }

 private:
  // Transposed: in rows of D.
  Strides v_strides(bool transposed) const {
    return transposed ? Strides{rank * stride_input, 1, stride_input} : Strides{rank, stride_projections, 1};
  }
  Strides u_strides(bool transposed) const {
    return transposed ? Strides{rank * stride_input, 1, stride_input} : Strides{rank, stride_experts, 1};
  }
  int64_t gate(int64_t e, const Strides& of_v) const { return E * rank * of_v.rank + e * of_v.rank; }
};

std::tuple<Tensor, Tensor, Tensor> mixed_cross_layer_cpu(const Tensor& x0, const Tensor& x, const Tensor& u,
                                                         const Tensor& v, const Tensor& weight,
                                                         const Tensor& gates, const Tensor& bias,
                                                         bool keep_product) {
  check("mixed_cross_layer", x0, x, u, v, weight, gates, bias);
  const int64_t B = x0.size(0), D = x0.size(1), E = weight.size(0), rank = weight.size(1);
  const Tensor x0u = unit_stride_last(x0), xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x0, {B, D}), product = new_empty_paged(x0, {keep_product ? B : 0, D});
  Tensor projections = new_empty_paged(x0, {B, E * rank + E}, accumulator_dtype(dtype_of(x0)));
  dispatch_floating(dtype_of(x0), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    Arena<A> shared;
    const Operands<A> operands(u);
    MixedCrossLayer<T> common{};
    common.x0 = static_cast<const T*>(x0u.const_data_ptr());
    common.x = static_cast<const T*>(xu.const_data_ptr());
    common.stride_x0 = x0u.stride(0);
    common.stride_x = xu.stride(0);
    std::tie(common.v, common.u) = operands.pack(u, v, gates, false, shared);
    common.bias = shared.row(values_of<A>(bias));
    common.experts = experts_of<A>(weight, shared);
    common.out = static_cast<T*>(out.mutable_data_ptr());
    common.product = keep_product ? static_cast<T*>(product.mutable_data_ptr()) : nullptr;
    common.projections = static_cast<A*>(projections.mutable_data_ptr());
    common.D = D;
    torch::stable::parallel_for(0, B, kFmChunk / (D + 1) + 1, [&](int64_t b0, int64_t b1) {
      Arena<A> arena;
      MixedCrossLayer<T> a = common;
      a.memory = arena.take(RK_DISPATCH_ISA(mixed_cross_layer_memory<T>, D, E, rank));
      a.experts.memory = arena.take(RK_DISPATCH_ISA(mixed_experts_memory<A>, E, rank));
      RK_DISPATCH_ISA(mixed_cross_layer<T>, a, {b0, b1});
    });
  });
  return {out, projections, product};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixed_cross_layer_backward_cpu(
    const Tensor& grad_out, const Tensor& projections, const Tensor& product, const Tensor& x0,
    const Tensor& x, const Tensor& u, const Tensor& v, const Tensor& weight, const Tensor& gates,
    const Tensor& bias) {
  const char* op = "mixed_cross_layer_backward";
  check(op, x0, x, u, v, weight, gates, bias);
  const int64_t B = x0.size(0), D = x0.size(1), E = weight.size(0), rank = weight.size(1);
  check_form(op, "grad_out", grad_out, {B, D}, dtype_of(x0));
  check_form(op, "projections", projections, {B, E * rank + E}, accumulator_dtype(dtype_of(x0)));
  check_form(op, "product", product, {B, D}, dtype_of(x0));
  const Tensor x0u = unit_stride_last(x0), xu = unit_stride_last(x), gu = unit_stride_last(grad_out),
               projected = torch::stable::contiguous(projections), pc = torch::stable::contiguous(product);
  const auto like = [](const Tensor& t) { return torch::stable::new_empty(t, t.sizes()); };
  Tensor grad_x0 = new_empty_paged(x0, {B, D}), grad_x = new_empty_paged(x0, {B, D}), grad_u = like(u),
         grad_v = like(v), grad_gates = like(gates), grad_weight, grad_bias;
  dispatch_floating(dtype_of(x0), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    Arena<A> shared;
    const Operands<A> operands(u);
    MixedCrossLayerBackward<T> common{};
    common.grad_out = static_cast<const T*>(gu.const_data_ptr());
    common.x0 = static_cast<const T*>(x0u.const_data_ptr());
    common.x = static_cast<const T*>(xu.const_data_ptr());
    common.product = static_cast<const T*>(pc.const_data_ptr());
    common.stride_grad = gu.stride(0);
    common.stride_x0 = x0u.stride(0);
    common.stride_x = xu.stride(0);
    std::tie(common.v, common.u) = operands.pack(u, v, gates, true, shared);
    common.weight = square_operands<A>(weight, false, shared);
    common.projections = static_cast<const A*>(projected.const_data_ptr());
    common.experts = experts_of<A>(weight, shared);
    common.grad_x0 = static_cast<T*>(grad_x0.mutable_data_ptr());
    common.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    common.D = D;
    const int64_t of_u = D * operands.stride_experts, of_v = operands.columns * operands.stride_input,
                  of_weight = E * rank * common.experts.stride;
    ChunkedSums<A> sums(B, E * rank + D, of_u + of_v + of_weight + operands.stride_input, kMixtureChunk);
    const A* sum = sums.run([&](Range samples, A* part) {
      Arena<A> arena;
      MixedCrossLayerBackward<T> a = common;
      a.memory = arena.take(RK_DISPATCH_ISA(mixed_cross_layer_backward_memory<T>, D, E, rank));
      a.experts.memory = arena.take(RK_DISPATCH_ISA(mixed_experts_memory<A>, E, rank));
      a.sum_u = part;
      a.sum_v = a.sum_u + of_u;
      a.sum_weight = a.sum_v + of_v;
      a.sum_bias = a.sum_weight + of_weight;
      RK_DISPATCH_ISA(mixed_cross_layer_backward<T>, a, samples);
    });
    const A *sum_v = sum + of_u, *sum_weight = sum_v + of_v, *sum_bias = sum_weight + of_weight;
    operands.unpack(sum, sum_v, grad_u, grad_v, grad_gates);
    grad_weight = gradient_of(
        weight, [&](int64_t i) { return sum_weight[i / rank * common.experts.stride + i % rank]; });
    grad_bias = gradient_of(bias, [&](int64_t d) { return sum_bias[d]; });
  });
  return {grad_x0, grad_x, grad_u, grad_v, grad_weight, grad_gates, grad_bias};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("mixed_cross_layer", TORCH_BOX(&rk::mixed_cross_layer_cpu));
  m.impl("mixed_cross_layer_backward", TORCH_BOX(&rk::mixed_cross_layer_backward_cpu));
}
