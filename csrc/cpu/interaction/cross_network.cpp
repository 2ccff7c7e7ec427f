// Checks, threads and registration of the cross network; the kernel and its mathematics are in
// cross_network_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
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

// The texts are those of ops/cross_network.py.
void check(const char* op, const Tensor& x, const Tensors& weights, const Tensors& biases) {
  RK_CHECK(x.dim() == 2, op, ": x must have 2 dimensions, got ", x.dim(), " (shape ", shape_of(x), ")");
  RK_CHECK(is_floating(dtype_of(x)), op, ": x must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype_of(x)));
  RK_CHECK(biases.size() == weights.size(), op, ": there must be a bias for each of ", weights.size(),
           " weights, got ", biases.size());
  const auto name = [](const char* list, size_t i) {
    return std::string(list) + '[' + std::to_string(i) + ']';
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    check_form(op, name("weights", i).c_str(), weights[i], {1, x.size(1)}, dtype_of(x));
    check_form(op, name("biases", i).c_str(), biases[i], {x.size(1)}, dtype_of(x));
  }
}

// The layers as the kernels want them, and each layer's beta.
template <class A>
struct Packed {
  Arena<A> arena;
  CrossLayers<A> layers{};
  A *weights, *betas;  // [layers, stride], [layers + 1, stride]

  Packed(const Tensors& w, const Tensors& b, int64_t D) {
    const int64_t L = w.size(), stride = padded<A>(D);
    weights = arena.take(L * stride);
    betas = arena.take((L + 1) * stride);
    A* constants = arena.take(L);
    for (int64_t l = 0; l < L; ++l) {
      const std::vector<A> weight = values_of<A>(w[l]), bias = values_of<A>(b[l]);
      std::copy(weight.begin(), weight.end(), weights + l * stride);
      double constant = 0;
      for (int64_t d = 0; d < D; ++d) {
        constant += static_cast<double>(weight[d]) * betas[l * stride + d];
        betas[(l + 1) * stride + d] = betas[l * stride + d] + bias[d];
      }
      constants[l] = static_cast<A>(constant);
    }
    layers = {weights, betas + L * stride, constants, stride, L, D};
  }
};

std::tuple<Tensor, Tensor> cross_network_cpu(const Tensor& x, const Tensors& weights, const Tensors& biases) {
  check("cross_network", x, weights, biases);
  const int64_t B = x.size(0), D = x.size(1), L = weights.size();
  const Tensor xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x, {B, D});
  Tensor projections = torch::stable::new_empty(x, {B, L}, accumulator_dtype(x.scalar_type()));
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Packed<Accumulator<T>> packed(weights, biases, D);
    CrossNetwork<T> a{};
    a.layers = packed.layers;
    a.x = static_cast<const T*>(xu.const_data_ptr());
    a.stride_row = xu.stride(0);
    a.out = static_cast<T*>(out.mutable_data_ptr());
    a.projections = static_cast<Accumulator<T>*>(projections.mutable_data_ptr());
    torch::stable::parallel_for(0, B, kFmChunk / (D + 1) + 1, [&](int64_t b0, int64_t b1) {
      RK_DISPATCH_ISA(cross_network<T>, a, {b0, b1});
    });
  });
  return {out, projections};
}

std::tuple<Tensor, Tensors, Tensors> cross_network_backward_cpu(const Tensor& grad_out,
                                                                const Tensor& projections, const Tensor& x,
                                                                const Tensors& weights,
                                                                const Tensors& biases) {
  const char* op = "cross_network_backward";
  check(op, x, weights, biases);
  const int64_t B = x.size(0), D = x.size(1), L = weights.size();
  check_form(op, "grad_out", grad_out, {B, D}, dtype_of(x));
  check_form(op, "projections", projections, {B, L}, accumulator_dtype(x.scalar_type()));
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out);
  const Tensor pu = torch::stable::contiguous(projections);
  Tensor grad_x = new_empty_paged(x, {B, D});
  Tensors grad_weights, grad_biases;
  dispatch_floating(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const Packed<A> packed(weights, biases, D);
    const int64_t stride = packed.layers.stride;
    ChunkedSums<A> sums(B, D, (L + 1) * stride + L);
    A* sum = sums.run([&](Range rows, A* part) {
      Arena<A> arena;
      CrossNetworkBackward<T> a{};
      a.layers = packed.layers;
      a.grad_out = static_cast<const T*>(gu.const_data_ptr());
      a.x = static_cast<const T*>(xu.const_data_ptr());
      a.stride_grad = gu.stride(0);
      a.stride_row = xu.stride(0);
      a.projections = static_cast<const A*>(pu.const_data_ptr());
      a.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
      a.sum_weights = part;
      a.sum_out = part + L * stride;
      a.sum_constants = part + (L + 1) * stride;
      a.memory = arena.take(5 * L);
      RK_DISPATCH_ISA(cross_network_backward<T>, a, rows);
    });
    A *of_beta = sum + L * stride, *constants = of_beta + stride;  // dL/dbeta_{l+1}, from the last layer down
    for (int64_t l = L - 1; l >= 0; --l) {
      const A *of_weight = sum + l * stride, *beta = packed.betas + l * stride,
              *weight = packed.weights + l * stride;
      grad_biases.push_back(gradient_of(biases[l], [&](int64_t d) { return of_beta[d]; }));
      grad_weights.push_back(
          gradient_of(weights[l], [&](int64_t d) { return of_weight[d] + constants[l] * beta[d]; }));
      for (int64_t d = 0; d < D; ++d) of_beta[d] += constants[l] * weight[d];
    }
  });
  std::reverse(grad_weights.begin(), grad_weights.end());
  std::reverse(grad_biases.begin(), grad_biases.end());
  return {grad_x, grad_weights, grad_biases};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("cross_network", TORCH_BOX(&rk::cross_network_cpu));
  m.impl("cross_network_backward", TORCH_BOX(&rk::cross_network_backward_cpu));
}
