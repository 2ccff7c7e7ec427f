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
  const Tensor &x, &input_weight, &weight, &bias;
  const OptionalTensor &attention, &lengths;

  int64_t B() const { return x.size(0); }
  int64_t L() const { return x.size(1); }
  int64_t inputs() const { return x.size(2); }
  int64_t D() const { return weight.size(1); }
};

// The texts are those of ops/augru.py.
void check(const AugruArguments& a) {
  RK_CHECK(a.x.dim() == 3, "augru: x must have 3 dimensions, got ", a.x.dim(), " (shape ", shape_of(a.x),
           ")");
  RK_CHECK(is_floating(dtype_of(a.x)), "augru: x must be float32, float64, float16 or bfloat16, got ",
           name_of(dtype_of(a.x)));
  RK_CHECK(a.weight.dim() == 2 && a.weight.size(0) == 3 * a.weight.size(1),
           "augru: weight must be [3 D, D], got shape ", shape_of(a.weight));
  const ScalarType dtype = dtype_of(a.x);
  check_form("augru", "weight", a.weight, {3 * a.D(), a.D()}, dtype);
  check_form("augru", "input_weight", a.input_weight, {3 * a.D(), a.inputs()}, dtype);
  check_form("augru", "bias", a.bias, {4, a.D()}, dtype);
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

// The weights as the kernel takes them: of gate i the units are columns i width .., the weights of h are rows
// 0 .. D, those of x rows width .. width + inputs.
template <class T, class A = Accumulator<T>>
class AugruOperands {
 public:
  AugruOperands(const AugruArguments& a, const AugruSamples& samples, const Tensor& x, const T* out)
      : D_(a.D()), inputs_(a.inputs()), width((D_ + kLine - 1) / kLine * kLine), columns(width + inputs_) {
    const std::vector<A> weight = values_of<A>(a.weight), input_weight = values_of<A>(a.input_weight),
                         bias = values_of<A>(a.bias);
    ld = padded<A>(columns);
    weight_ = arena_.take(columns * padded<A>(4 * width));
    rows = arena_.take(4 * width * ld);
    A* biases = arena_.take(padded<A>(4 * width));
    for (int64_t i = 0; i < 3 * D_; ++i) {
      for (int64_t j = 0; j < D_; ++j) set(unit(i, false), j, weight[i * D_ + j]);
      for (int64_t j = 0; j < inputs_; ++j) set(unit(i, true), width + j, input_weight[i * inputs_ + j]);
    }
    for (int64_t gate = 0; gate < 4; ++gate) std::copy_n(bias.begin() + gate * D_, D_, biases + gate * width);
    k.x = static_cast<const T*>(x.const_data_ptr());
    k.stride_sample = x.stride(0);
    k.stride_step = x.stride(1);
    if (a.attention) {
      k.attention = static_cast<const T*>(a.attention->const_data_ptr());
      k.stride_attention = a.attention->stride(0);
      k.stride_attention_step = a.attention->stride(1);
    }
    k.weight = weight_;
    k.bias = biases;
    k.order = samples.order.data();
    k.lengths = samples.lengths.data();
    k.out = const_cast<T*>(out);
    k.L = a.L();
    k.D = D_;
    k.inputs = inputs_;
    k.width = width;
    k.columns = columns;
  }

  // Of row i of weight, or of input_weight, the place among the gates' units: the candidate's weights of x
  // are those of its second part.
  int64_t unit(int64_t i, bool of_input) const {
    const int64_t gate = i / D_;
    return (gate + (of_input && gate == 2)) * width + i % D_;
  }

  AugruScratch<A> scratch(Arena<A>& arena) const {
    AugruScratch<A> s{};
    s.state = arena.take(kAugruRows * ld);
    s.product = arena.take(kAugruRows * padded<A>(4 * width));
    return s;
  }

 private:
  void set(int64_t unit, int64_t column, A value) {
    weight_[column * padded<A>(4 * width) + unit] = value;
    rows[unit * ld + column] = value;
  }
  static constexpr int64_t kLine = 64 / sizeof(A);
  int64_t D_, inputs_;
  Arena<A> arena_;
  A* weight_;

 public:
  int64_t width, columns, ld;
  Augru<T> k{};
  A* rows;
};

// Blocks of samples, and what a pass reads and multiplies.
int64_t blocks_of(const AugruArguments& a) { return (a.B() + kAugruRows - 1) / kAugruRows; }
int64_t work_of(const AugruArguments& a) { return a.B() * a.L() * a.D() * (a.D() + a.inputs()); }

Tensor augru_cpu(const Tensor& x, const Tensor& input_weight, const Tensor& weight, const Tensor& bias,
                 const OptionalTensor& attention, const OptionalTensor& lengths) {
  const AugruArguments a{x, input_weight, weight, bias, attention, lengths};
  check(a);
  const AugruSamples samples(a);
  const Tensor xu = unit_stride_last(x);
  Tensor out = new_empty_paged(x, {a.B(), a.L(), a.D()});
  dispatch_floating(dtype_of(x), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AugruOperands<T> operands(a, samples, xu, static_cast<T*>(out.mutable_data_ptr()));
    run_tasks(blocks_of(a), work_of(a), [&](int64_t block) {
      Arena<Accumulator<T>> arena;
      RK_DISPATCH_ISA(augru<T>, operands.k, {block * kAugruRows, std::min(a.B(), (block + 1) * kAugruRows)},
                      operands.scratch(arena));
    });
  });
  return out;
}

// Sums over the blocks of a task, whose number depends on the shape alone: the same bits for any number of
// threads. Gradients of input_weight, weight and bias.
template <class T, class A = Accumulator<T>>
std::tuple<Tensor, Tensor, Tensor> backward_blocks(const AugruArguments& a, const AugruOperands<T>& operands,
                                                   const AugruBackward<T>& k) {
  const int64_t blocks = blocks_of(a), tasks = std::min(blocks, kAugruSums), ld = operands.ld;
  const int64_t width = operands.width, size = 4 * width * ld, all_sums = size + 4 * width;
  std::vector<std::unique_ptr<Arena<A>>> arenas(tasks);
  std::vector<A*> sums(tasks);
  run_tasks(tasks, 3 * work_of(a), [&](int64_t task) {
    arenas[task] = std::make_unique<Arena<A>>();
    AugruScratch<A> s = operands.scratch(*arenas[task]);
    s.grad_state = arenas[task]->take(kAugruRows * ld);
    s.grad_weight = sums[task] = arenas[task]->take(all_sums);
    s.grad_bias = s.grad_weight + size;
    for (int64_t block = task; block < blocks; block += tasks)
      RK_DISPATCH_ISA(augru_backward<T>, k, {block * kAugruRows, std::min(a.B(), (block + 1) * kAugruRows)},
                      s);
  });
  std::vector<A> none(tasks ? 0 : all_sums);
  A* const all = tasks ? sums[0] : none.data();
  for (int64_t task = 1; task < tasks; ++task)
    for (int64_t i = 0; i < all_sums; ++i) all[i] += sums[task][i];
  const int64_t D = a.D(), K = a.inputs();
  const auto of_input = [&](int64_t i) { return all[operands.unit(i / K, true) * ld + width + i % K]; };
  const auto of_state = [&](int64_t i) { return all[operands.unit(i / D, false) * ld + i % D]; };
  const auto of_bias = [&](int64_t i) { return all[size + i / D * width + i % D]; };
  return {gradient_of(a.input_weight, of_input), gradient_of(a.weight, of_state),
          gradient_of(a.bias, of_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> augru_backward_cpu(
    const Tensor& grad_out, const Tensor& out, const Tensor& x, const Tensor& input_weight,
    const Tensor& weight, const Tensor& bias, const OptionalTensor& attention,
    const OptionalTensor& lengths) {
  const AugruArguments a{x, input_weight, weight, bias, attention, lengths};
  check(a);
  const ScalarType dtype = dtype_of(x);
  check_form("augru_backward", "grad_out", grad_out, {a.B(), a.L(), a.D()}, dtype);
  check_form("augru_backward", "out", out, {a.B(), a.L(), a.D()}, dtype);
  const AugruSamples samples(a);
  const Tensor xu = unit_stride_last(x), gu = unit_stride_last(grad_out),
               kept = torch::stable::contiguous(out);
  Tensor grad_x = new_empty_paged(x, {a.B(), a.L(), a.inputs()}), grad_input_weight, grad_weight, grad_bias;
  Tensor grad_attention = torch::stable::new_empty(x, {attention ? a.B() : 0, a.L()});
  dispatch_floating(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AugruOperands<T> operands(a, samples, xu, static_cast<const T*>(kept.const_data_ptr()));
    AugruBackward<T> k{};
    k.forward = operands.k;
    k.grad_out = static_cast<const T*>(gu.const_data_ptr());
    k.stride_grad = gu.stride(0);
    k.stride_grad_step = gu.stride(1);
    k.weight_rows = operands.rows;
    k.grad_x = static_cast<T*>(grad_x.mutable_data_ptr());
    k.grad_attention = attention ? static_cast<T*>(grad_attention.mutable_data_ptr()) : nullptr;
    std::tie(grad_input_weight, grad_weight, grad_bias) = backward_blocks<T>(a, operands, k);
  });
  return {grad_x, grad_input_weight, grad_weight, grad_bias, grad_attention};
}

}  // namespace
}  // namespace rk

STABLE_TORCH_LIBRARY_IMPL(rankkernels, CPU, m) {
  m.impl("augru", TORCH_BOX(&rk::augru_cpu));
  m.impl("augru_backward", TORCH_BOX(&rk::augru_backward_cpu));
}
