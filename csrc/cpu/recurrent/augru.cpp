// Checks, threads and registration of the recurrence; the kernel and its mathematics are in augru_kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/recurrent/params.h"
#include "cpu/runtime/arena.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/parallel.h"
#include "cpu/runtime/values.h"
#include "cpu/tuning.h"
#include "stable/check.h"

namespace rk {
namespace {

struct AugruArguments {
  const Tensor &gates, &weight, &bias;
  const OptionalTensor &attention, &lengths;

  int64_t B() const { return gates.size(0); }
  int64_t L() const { return gates.size(1); }
  int64_t D() const { return weight.size(1); }
};

// The texts are those of ops/augru.py.
void check(const AugruArguments& a) {
  RK_CHECK(a.gates.dim() == 3, "augru: gates must have 3 dimensions, got ", a.gates.dim(), " (shape ",
           shape_of(a.gates), ")");
  RK_CHECK(is_floating(dtype_of(a.gates)), "augru: gates must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype_of(a.gates)));
  RK_CHECK(
      a.weight.dim() == 2 && a.weight.size(0) == 3 * a.weight.size(1) && a.weight.size(0) == a.gates.size(2),
      "augru: weight must be [3 D, D] of the ", a.gates.size(2), " = 3 D gates, got shape ",
      shape_of(a.weight));
  const ScalarType dtype = dtype_of(a.gates);
  check_form("augru", "weight", a.weight, {3 * a.D(), a.D()}, dtype);
  check_form("augru", "bias", a.bias, {a.D()}, dtype);
  if (a.attention) check_form("augru", "attention", *a.attention, {a.B(), a.L()}, dtype);
  if (!a.lengths) return;
  RK_CHECK(a.lengths->dim() == 1 && a.lengths->size(0) == a.B(), "augru: lengths must be [B] = [", a.B(),
           "], got shape ", shape_of(*a.lengths));
  RK_CHECK(dtype_of(*a.lengths) == ScalarType::Int || dtype_of(*a.lengths) == ScalarType::Long,
           "augru: lengths must be int32 or int64, got ", name_of(dtype_of(*a.lengths)));
  RK_CHECK(a.lengths->is_cpu(), "augru: all arguments must be on one device");
}

// The positions of each sample, and the samples, the longest first.
struct AugruSamples {
  explicit AugruSamples(const AugruArguments& a) : lengths(a.B(), a.L()), order(a.B()) {
    std::iota(order.begin(), order.end(), 0);
    if (!a.lengths) return;
    lengths = integers_of(*a.lengths);
    for (int64_t b = 0; b < a.B(); ++b)
      RK_CHECK(lengths[b] >= 0 && lengths[b] <= a.L(), "augru: lengths[", b, "] = ", lengths[b],
               " is outside 0 .. ", a.L(), ", the positions");
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  }
  std::vector<int64_t> lengths, order;
};

// The weights as the kernel takes them, each gate's units in whole cache lines.
template <class T, class A = Accumulator<T>>
class AugruOperands {
 public:
  AugruOperands(const AugruArguments& a, const AugruSamples& samples, const Tensor& gates,
                const OptionalTensor& attention, const T* out)
      : D(a.D()), width((D + kLine - 1) / kLine * kLine) {
    const std::vector<A> weight = values_of<A>(a.weight), bias = values_of<A>(a.bias);
    A *columns = arena_.take(width * padded<A>(3 * width)), *all = arena_.take(padded<A>(3 * width));
    rows = arena_.take(3 * width * padded<A>(width));
    for (int64_t gate = 0; gate < 3; ++gate)
      for (int64_t i = 0; i < D; ++i)
        for (int64_t j = 0; j < D; ++j) {
          const A w = weight[(gate * D + i) * D + j];
          columns[j * padded<A>(3 * width) + gate * width + i] = w;
          rows[(gate * width + i) * padded<A>(width) + j] = w;
        }
    std::copy(bias.begin(), bias.end(), all + 2 * width);
    k.gates = static_cast<const T*>(gates.const_data_ptr());
    k.stride_sample = gates.stride(0);
    k.stride_step = gates.stride(1);
    if (attention) {
      k.attention = static_cast<const T*>(attention->const_data_ptr());
      k.stride_attention = attention->stride(0);
      k.stride_attention_step = attention->stride(1);
    }
    k.weight = columns;
    k.bias = all;
    k.order = samples.order.data();
    k.lengths = samples.lengths.data();
    k.out = const_cast<T*>(out);
    k.L = a.L();
    k.D = D;
    k.width = width;
  }

  AugruScratch<A> scratch(Arena<A>& arena) const {
    AugruScratch<A> s{};
    s.state = arena.take(kAugruRows * padded<A>(width));
    s.product = arena.take(kAugruRows * padded<A>(3 * width));
    return s;
  }

  int64_t D, width;
  Augru<T> k{};
  A* rows;

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);
  Arena<A> arena_;
};

// Blocks of samples, and what a pass reads and multiplies.
int64_t blocks_of(const AugruArguments& a) { return (a.B() + kAugruRows - 1) / kAugruRows; }
int64_t work_of(const AugruArguments& a) { return a.B() * a.L() * a.D() * (a.D() + 3); }

Tensor augru_cpu(const Tensor& gates, const Tensor& weight, const Tensor& bias,
                 const OptionalTensor& attention, const OptionalTensor& lengths) {
  const AugruArguments a{gates, weight, bias, attention, lengths};
  check(a);
  const AugruSamples samples(a);
  const Tensor gu = unit_stride_last(gates);
  Tensor out = new_empty_paged(gates, {a.B(), a.L(), a.D()});
  dispatch_floating(dtype_of(gates), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AugruOperands<T> operands(a, samples, gu, attention, static_cast<T*>(out.mutable_data_ptr()));
    run_tasks(blocks_of(a), work_of(a), [&](int64_t block) {
      Arena<Accumulator<T>> arena;
      RK_DISPATCH_ISA(augru<T>, operands.k, {block * kAugruRows, std::min(a.B(), (block + 1) * kAugruRows)},
                      operands.scratch(arena));
    });
  });
  return out;
}

// Sums over the blocks of a task, whose number depends on the shape alone: the same bits for any number of
// threads.
template <class T, class A = Accumulator<T>>
std::tuple<Tensor, Tensor> backward_blocks(const AugruArguments& a, const AugruOperands<T>& operands,
                                           const AugruBackward<T>& k) {
  const int64_t blocks = blocks_of(a), tasks = std::min(blocks, kAugruSums);
  const int64_t ld = padded<A>(operands.width), size = 3 * operands.width * ld;
  std::vector<std::unique_ptr<Arena<A>>> arenas(tasks);
  std::vector<A*> sums(tasks);
  run_tasks(tasks, 3 * work_of(a), [&](int64_t task) {
    arenas[task] = std::make_unique<Arena<A>>();
    AugruScratch<A> s = operands.scratch(*arenas[task]);
    s.grad_state = arenas[task]->take(kAugruRows * ld);
    s.grad_weight = sums[task] = arenas[task]->take(size + ld);
    s.grad_bias = s.grad_weight + size;
    for (int64_t block = task; block < blocks; block += tasks)
      RK_DISPATCH_ISA(augru_backward<T>, k, {block * kAugruRows, std::min(a.B(), (block + 1) * kAugruRows)},
                      s);
  });
  std::vector<A> none(tasks ? 0 : size + ld);
  A* const all = tasks ? sums[0] : none.data();
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t i = 0; i < size + ld; ++i) all[i] += sums[task][i];
  const int64_t D = a.D(), width = operands.width;
  return {gradient_of(a.weight, [&](int64_t i) { return all[(i / D / D * width + i / D % D) * ld + i % D]; }),
          gradient_of(a.bias, [&](int64_t i) { return all[size + i]; })};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> augru_backward_cpu(const Tensor& grad_out, const Tensor& out,
                                                              const Tensor& gates, const Tensor& weight,
                                                              const Tensor& bias,
                                                              const OptionalTensor& attention,
                                                              const OptionalTensor& lengths) {
  const AugruArguments a{gates, weight, bias, attention, lengths};
  check(a);
  const ScalarType dtype = dtype_of(gates);
  check_form("augru_backward", "grad_out", grad_out, {a.B(), a.L(), a.D()}, dtype);
  check_form("augru_backward", "out", out, {a.B(), a.L(), a.D()}, dtype);
  const AugruSamples samples(a);
  const Tensor gu = unit_stride_last(gates), du = unit_stride_last(grad_out);
  const Tensor kept = torch::stable::contiguous(out);
  Tensor grad_gates = new_empty_paged(gates, {a.B(), a.L(), 3 * a.D()}), grad_weight, grad_bias;
  Tensor grad_attention = torch::stable::new_empty(gates, {attention ? a.B() : 0, a.L()});
  dispatch_floating(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AugruOperands<T> operands(a, samples, gu, attention, static_cast<const T*>(kept.const_data_ptr()));
    AugruBackward<T> k{};
    k.forward = operands.k;
    k.grad_out = static_cast<const T*>(du.const_data_ptr());
    k.stride_grad = du.stride(0);
    k.stride_grad_step = du.stride(1);
    k.weight_rows = operands.rows;
    k.grad_gates = static_cast<T*>(grad_gates.mutable_data_ptr());
    k.grad_attention = attention ? static_cast<T*>(grad_attention.mutable_data_ptr()) : nullptr;
    std::tie(grad_weight, grad_bias) = backward_blocks<T>(a, operands, k);
  });
  return {grad_gates, grad_weight, grad_bias, grad_attention};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("augru", TORCH_BOX(&rk::augru_cpu));
  m.impl("augru_backward", TORCH_BOX(&rk::augru_backward_cpu));
}
