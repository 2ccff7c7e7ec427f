// Checks, threads and registration of the weight's gradient; the kernel and its mathematics are in
// linear_weight_grad_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu/dense/params.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/isa.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

// The texts are those of ops/linear_weight_grad.py.
Tensor linear_weight_grad_cpu(const Tensor& dy, const Tensor& x) {
  RK_CHECK_DIM("linear_weight_grad", dy, 2);
  RK_CHECK_DIM("linear_weight_grad", x, 2);
  for (const auto& [name, t] : {std::pair("dy", &dy), std::pair("x", &x)})
    RK_CHECK(dtype_of(*t) == ScalarType::Float, "linear_weight_grad: ", name, " must be torch.float32, got ",
             name_of(dtype_of(*t)));
  const int64_t N = dy.size(0), M = dy.size(1), K = x.size(1);
  RK_CHECK(x.size(0) == N, "linear_weight_grad: x must have the rows of dy, ", N, ", got ", x.size(0));
  const Tensor dyu = unit_stride_last(dy), xu = unit_stride_last(x);
  Tensor grad = torch::stable::new_empty(x, {M, K});
  LinearWeightGrad shared{};
  shared.grad_out = static_cast<const float*>(dyu.const_data_ptr());
  shared.stride_grad = dyu.stride(0);
  shared.x = static_cast<const float*>(xu.const_data_ptr());
  shared.stride_x = xu.stride(0);
  shared.grad_weight = static_cast<float*>(grad.mutable_data_ptr());
  shared.K = K;
  const int64_t panel = RK_DISPATCH_ISA(linear_weight_grad_panel), panels = (K + panel - 1) / panel,
                blocks = (M + kWeightGradRows - 1) / kWeightGradRows, tasks = panels * blocks;
  // The last of an odd number of tasks is two, of half its rows, so that two threads end together.
  const bool halved = tasks % 2 && M >= kWeightGradRows;
  for (int64_t n0 = 0; n0 == 0 || n0 < N; n0 += kWeightGradSamples) {
    shared.samples = {n0, std::min(N, n0 + kWeightGradSamples)};
    shared.add = n0 > 0;
    run_tasks(tasks + halved, (shared.samples.end - n0) * M * K / 16, [&](int64_t task) {
      const bool second_half = task == tasks;
      int64_t m0 = (task - second_half) / panels * kWeightGradRows, m1 = std::min(M, m0 + kWeightGradRows);
      if (halved && task >= tasks - 1) (second_half ? m0 : m1) = m0 + (m1 - m0) / 2;
      Arena<float> arena;
      float* memory = arena.take(RK_DISPATCH_ISA(linear_weight_grad_memory, m1 - m0));
      LinearWeightGrad a = shared;
      a.first_column = (task - second_half) % panels * panel;
      RK_DISPATCH_ISA(linear_weight_grad, a, {m0, m1}, memory);
    });
  }
  return grad;
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("linear_weight_grad", TORCH_BOX(&rk::linear_weight_grad_cpu));
}
